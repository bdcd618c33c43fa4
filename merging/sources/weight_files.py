"""The weights files in a model's folder: one file, shards with an index, or a variant of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.errors import FormatError, InputError
from merging.sources.distributed import METADATA, is_distributed
from merging.sources.links import check_inside
from merging.sources.pickled import PYTORCH_ENDINGS
from merging.sources.small_files import LIST_LIMIT, is_there, read_json
from merging.sources.stored import Stored
from merging.sources.tied_weights import stated_tie, tied_to

__all__ = [
    "agree",
    "check_absent",
    "check_suffix",
    "find_weights",
    "gguf_shards",
    "is_plain_name",
    "is_shard",
    "is_standard",
    "refuse_shard",
    "shards_of",
    "shards_without_index",
    "stem_of",
    "weights_of",
]

_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_ENDINGS = ("safetensors", "safetensors.index.json", "bin", "bin.index.json")

_LAYOUTS = tuple(
    f"{stem}.{ending}"
    for stems, endings in ((_STEMS[:2], _ENDINGS[:2]), (_STEMS[1:], _ENDINGS[2:]))
    for stem in stems
    for ending in endings
)
"""The files that hold a model's weights, in the order in which libraries look for them."""

_VARIANTS = tuple(
    re.compile(rf"(?:{'|'.join(_STEMS)})\.{pattern}")
    for pattern in (
        r"(?P<variant>[\w-]+)\.safetensors",
        r"safetensors\.index\.(?P<variant>[\w-]+)\.json",
        r"safetensors\.(?P<variant>[\w-]+)\.index\.json",
        r"(?P<variant>[\w-]+)\.bin",
        r"bin\.index\.(?P<variant>[\w-]+)\.json",
        r"bin\.(?P<variant>[\w-]+)\.index\.json",
    )
)
"""The names of weights of a variant (``fp16``), in order of preference."""

_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}$|^[0-9]{5}-of-[0-9]{5}$")

_NUMBERED = re.compile(r"(?P<set>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.(?P<ending>safetensors|bin|gguf)")
"""A shard's name: its set, its number, and the number of shards."""


def is_standard(name: str) -> bool:
    """Whether a file of this name holds the weights of the model in its folder."""
    return name in _LAYOUTS or any(pattern.fullmatch(name) for pattern in _VARIANTS)


def stem_of(weights: Path) -> str:
    """Return the stem of the output's weights files, from the input's: the name that the model's library looks for."""
    return "diffusion_pytorch_model" if weights.name.startswith("diffusion_pytorch_model.") else "model"


def find_weights(folder: Path) -> Path | None:
    """Return the file or index with a model's weights, None if none has a standard name.

    Without such a file, the only variant (``model.fp16.safetensors``) is returned. Raises
    :class:`~merging.errors.InputError` if there are several variants.
    """
    for name in _LAYOUTS:
        if is_there(folder / name, None):
            return folder / name
    found: dict[str, Path] = {}
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for pattern in _VARIANTS:
        for name in names:
            match = pattern.fullmatch(name)
            if match and not _SHARD.search(match["variant"]):
                found.setdefault(match["variant"], folder / name)
    if len(found) > 1:
        raise InputError(
            f"{folder}: which weights? The folder holds only the variants {', '.join(sorted(found))}: leave one of "
            f"them in it, or name the file"
        )
    weights = next(iter(found.values()), None) or next(iter(shards_without_index(folder)), None)
    return weights and check_inside(weights, folder)


def shards_without_index(folder: Path) -> list[Path]:
    """Return the shards of a model whose folder has no index; none if there are none, or shards of several models.

    Raises :class:`~merging.errors.InputError` if a shard is missing.
    """
    sets: dict[tuple[str, str, str], dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _NUMBERED.fullmatch(path.name)
        if match and match["ending"] != "gguf":
            shards = sets.setdefault((match["set"], match["count"], match["ending"]), {})
            shards[int(match["number"])] = path
    safe = {key: shards for key, shards in sets.items() if key[2] == "safetensors"} or sets
    if len(safe) != 1:
        return []
    ((name, count, ending), shards) = next(iter(safe.items()))
    missing = [number for number in range(1, int(count) + 1) if number not in shards] if int(count) < 10_000 else [0]
    if missing:
        raise InputError(
            f"{folder}: holds {len(shards)} of the {int(count)} shards of a model, and no index: "
            f"{name}-{missing[0]:05}-of-{count}.{ending} is missing: complete the download"
        )
    return [check_inside(shards[number], folder) for number in sorted(shards)]


def is_shard(name: str) -> bool:
    """Whether a file of this name is one of several shards."""
    match = _NUMBERED.fullmatch(name)
    return match is not None and int(match["count"]) > 1


def refuse_shard(path: Path) -> None:
    """Refuse a file whose name is one of several shards'. Raises :class:`~merging.errors.InputError`."""
    if is_shard(path.name):
        raise InputError(
            f"{path}: is one of several shards of a model by its name: name their folder, "
            f"{path.parent}, or give the file another name if it is a whole model"
        )


def weights_of(folder: Path) -> Path:
    """Return the file or index with a model's weights; a single safetensors file may have any name.

    Raises :class:`~merging.errors.InputError` if it is not clear which file it is.
    """
    weights = find_weights(folder)
    if weights is not None:
        return weights
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return check_inside(found[0], folder)
    if not found:
        found = [path for path in sorted(folder.glob("*.gguf")) if _is_first(path.name)]
        if len(found) == 1:
            return check_inside(found[0], folder)
    if found:
        raise InputError(
            f"{folder}: which weights? The folder holds {', '.join(path.name for path in found)}: name the file"
        )
    if is_distributed(folder):
        return folder / METADATA
    if (folder / "zero_to_fp32.py").is_file():
        raise InputError(
            f"{folder}: holds the shards of DeepSpeed, and no weights: make them of the shards with "
            f"`python {folder}/zero_to_fp32.py {folder} {folder}`"
        )
    inner = _folders_of_models(folder)
    if inner:
        raise InputError(
            f"{folder}: holds no weights itself, but folders that do: name those to merge: {', '.join(inner[:4])}"
            f"{f' (of {len(inner)})' if len(inner) > 4 else ''}"
        )
    raise InputError(f"{folder}: holds no weights: none of model.safetensors, its index, or pytorch_model.bin is there")


def _folders_of_models(folder: Path) -> list[str]:
    """Return the folders inside of a folder that hold an adapter or a model."""
    signs = ("adapter_config.json", "adapter_model.safetensors", *_LAYOUTS)
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [str(path) for path in inner if any((path / sign).is_file() for sign in signs)]


def check_suffix(path: Path) -> None:
    """Refuse a file whose name is not a weights file's. Raises :class:`~merging.errors.FormatError`."""
    if path.suffix not in (".safetensors", ".gguf", *PYTORCH_ENDINGS):
        raise FormatError(
            f"{path}: is not a weights file: .safetensors, .gguf, .bin, .pt, .pth or .ckpt are read, or a folder"
        )


def _is_first(name: str) -> bool:
    """Whether a GGUF file holds a language model, or the first part of one."""
    match = _NUMBERED.fullmatch(name)
    return not name.startswith("mmproj") and (match is None or int(match["number"]) == 1)


def gguf_shards(path: Path) -> list[Path]:
    """Return all files of a model in GGUF: ``path`` and the other shards, if there are any. The first has the metadata.

    Raises :class:`~merging.errors.InputError` if a shard is missing.
    """
    match = _NUMBERED.fullmatch(path.name)
    if match is None:
        return [path]
    names = [f"{match['set']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]
    shards = [path.with_name(name) for name in names]
    missing = next((shard for shard in shards if not shard.exists()), None)
    if missing is not None:
        raise InputError(f"{path}: its shard {missing.name} is missing: complete the download")
    return [check_inside(shard, path.parent) for shard in shards]


def shards_of(index: Path, *, given: bool = False) -> dict[Path, set[str]]:
    """Return the tensor names that an index lists for each of its shards; a ``given`` index was named by the user."""
    weight_map = read_json(index, LIST_LIMIT, given=given).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        hint = f": to name a model, name the folder, {index.parent}" if given else ""
        raise FormatError(f"{index}: has no weight_map, so it is not an index of shards{hint}")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not is_plain_name(shard):
            raise FormatError(f"{index}: {name} is said to be in {shard!r}, which is not a plain file name")
        shards.setdefault(index.parent / shard, set()).add(name)
    for shard_path in shards:
        if not shard_path.is_file():
            raise FormatError(f"{index}: its shard {shard_path.name} is missing: complete the download")
        check_inside(shard_path, index.parent)
    return dict(sorted(shards.items()))


def is_plain_name(value: object) -> bool:
    """Whether a value from a file is the plain name of a file in the same folder, without any path."""
    if not isinstance(value, str) or value in ("", ".", "..") or Path(value).name != value:
        return False
    return "\\" not in value and "\0" not in value and len(value.encode(errors="replace")) < 256


def agree(index: Path, shard: Path, promised: set[str], found: set[str]) -> set[str]:
    """Return the names that an index lists and its shard lacks. Refuse a shard with names that its index lacks."""
    extra = sorted(found - promised)
    if extra:
        raise _disagreement(index, shard, f"holds {extra[0]}, which the index does not list", len(extra) - 1)
    return promised - found


def check_absent(
    index: Path, absent: Mapping[str, Path], tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> None:
    """Refuse names that an index lists and its shards lack, unless they are other names of stored tensors.

    Some programs list copies of tied weights, and leave them out of the shards.
    """
    tied = stated_tie(config, tensors)
    lost = sorted(name for name in absent if tied_to(name, tensors, tied) is None)
    if lost:
        raise _disagreement(index, absent[lost[0]], f"lacks {lost[0]}", len(lost) - 1)


def _disagreement(index: Path, shard: Path, what: str, more: int) -> FormatError:
    return FormatError(
        f"{shard}: {what}{f' (and {more} more such names)' if more else ''}: {index.name} and its shards come from "
        f"different saves, get them again together"
    )
