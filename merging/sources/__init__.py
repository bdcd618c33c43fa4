"""Readers of models on the disk: full checkpoints and adapters, opened from their headers and read piece by piece.

A new file format is one module with ``recognizes(contents)`` and an opener that returns an ``Adapter``, and one line in
``DIALECTS``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from merging.errors import FormatError, InputError
from merging.os_calls import kind_of
from merging.sources import diffusion_loras, kohya, mlx, packs, peft
from merging.sources.adapter import Adapter
from merging.sources.checkpoint import Checkpoint, open_checkpoint
from merging.sources.dtypes import DTYPES
from merging.sources.gguf import loras
from merging.sources.links import check_inside
from merging.sources.loose_factors import refuse_factors, refuse_foreign
from merging.sources.lora_headers import METADATA_KEY
from merging.sources.lycoris import LYCORIS_TYPES
from merging.sources.open_files import File
from merging.sources.opening import FileOpener, open_tensors
from merging.sources.small_files import is_there, read_json
from merging.sources.stored import FileContents, Stored, holders_of
from merging.sources.tensor_names import add_tensor_names
from merging.sources.training_leftovers import refuse_ungathered, without_wrappers
from merging.sources.weight_files import check_suffix, find_weights

__all__ = [
    "DIALECTS",
    "Adapter",
    "Checkpoint",
    "Dialect",
    "Model",
    "check_in_place",
    "dialect_of",
    "open_local",
    "tensors_of",
]

Model = Checkpoint | Adapter
"""A full model, or changes of one."""

Recognizes = Callable[[FileContents], bool]
Opens = Callable[[Path, float | None, FileContents], Adapter]


@dataclass(frozen=True, slots=True)
class Dialect:
    """A format of adapters, recognised by a file's tensor names and header."""

    name: str
    summary: str
    recognizes: Recognizes
    opens: Opens


_LYCORIS = ", ".join(dict.fromkeys(kind.summary for kind in LYCORIS_TYPES.values()))

DIALECTS = (
    Dialect(
        "pack",
        "what an adapter holds, or what a full model changed, in few bits: written by merge compress",
        packs.recognizes,
        packs.open_pack,
    ),
    Dialect(
        "GGUF",
        "LoRA of llama.cpp: of language models, also of experts",
        loras.recognizes,
        loras.open_gguf_lora,
    ),
    Dialect(
        "MLX",
        "LoRA and DoRA of mlx-lm, also of experts, with the config next to them; layers trained in full",
        mlx.recognizes,
        mlx.open_mlx,
    ),
    Dialect(
        "Kohya",
        f"LoRA of diffusion models with flat names; {_LYCORIS}",
        kohya.recognizes,
        kohya.open_kohya,
    ),
    Dialect(
        "diffusers",
        "LoRA of diffusion models with dotted names: diffusers, old and new, ComfyUI and others, XLabs, bare names",
        diffusion_loras.recognizes,
        diffusion_loras.open_diffusion,
    ),
    Dialect("PEFT", "adapters of PEFT, a folder or a bare file", peft.recognizes, peft.open_peft),
)
"""All formats of adapters that are read. The first that recognizes a file opens it."""


def dialect_of(contents: FileContents) -> Dialect | None:
    """Return the format of an adapter's file, None if no format recognizes it."""
    return next((dialect for dialect in DIALECTS if dialect.recognizes(contents)), None)


def tensors_of(model: Checkpoint | Adapter) -> list[Stored]:
    """Return all tensors that a model has in its files."""
    if isinstance(model, Checkpoint):
        return list(model.tensors.values())
    return [stored for change in model.changes.values() for stored in change.tensors]


def check_in_place(model: Checkpoint | Adapter) -> None:
    """Check that a model's weights files are still the opened files. Raises :class:`~merging.errors.FormatError`."""
    for holder in holders_of(tensors_of(model)):
        if isinstance(holder, File):
            holder.check_place()


def open_local(
    path: Path, alpha: float | None = None, dequantize: bool = False, open_file: FileOpener = open_tensors
) -> Checkpoint | Adapter:
    """Open a full model or an adapter in an existing folder or file.

    ``open_file`` opens its weights files; the other arguments are as in
    :func:`~merging.hub.open_model.open_model`, which also takes names on the Hub.
    """
    if path.is_dir():
        _check_one_model(path)
        if is_there(path / "adapter_config.json"):
            if is_there(path / mlx.WEIGHTS, None) and not any(is_there(path / name, None) for name in peft.WEIGHTS):
                weights = check_inside(path / mlx.WEIGHTS, path)
                return _check_numbers(replace(mlx.open_mlx(weights, alpha, open_file(weights)), path=path))
            return _check_numbers(_configured_adapter(path, alpha, open_file))
        bare = _bare_adapter(path, open_file)
        return open_local(bare, alpha, dequantize, open_file) if bare else _checkpoint(path, dequantize, open_file)
    if not path.is_file():
        raise FormatError(f"{path}: is {kind_of(path.stat().st_mode)}, and should be a file or a folder")
    if path.suffix == ".json":
        return _checkpoint(path, dequantize, open_file)
    check_suffix(path)
    contents = open_file(path)
    if not contents[0]:
        raise FormatError(f"{path}: holds no tensors")
    plain = without_wrappers(contents)
    refuse_foreign(path, plain[0])
    dialect = dialect_of(plain)
    if dialect is None:
        return _checkpoint(path, dequantize, lambda file: contents if file == path else open_file(file))
    refuse_ungathered(path, plain[0])
    return _check_numbers(add_tensor_names(dialect.opens(path, alpha, plain), plain))


def _configured_adapter(folder: Path, alpha: float | None, open_file: FileOpener) -> Adapter:
    """Open an adapter's folder of PEFT, or of diffusion-pipe, which puts a config of PEFT next to names of ComfyUI."""
    weights = peft.weights_of(folder)
    contents = without_wrappers(open_file(weights))
    tensors, metadata = contents
    if not tensors or not all(name.startswith("diffusion_model.") for name in tensors):
        return peft.open_peft(folder, alpha, contents)
    refuse_ungathered(folder, tensors)
    config = read_json(folder / "adapter_config.json")
    stated = {**metadata, METADATA_KEY: json.dumps(config)}
    opened = diffusion_loras.open_diffusion(weights, alpha, (tensors, stated))
    return add_tensor_names(replace(opened, path=folder, config={**config, **opened.config}), contents)


def _checkpoint(path: Path, dequantize: bool, open_file: FileOpener) -> Checkpoint:
    """Open a full model. Refuse it if one of its tensors is a part of an adapter."""
    checkpoint = open_checkpoint(path, dequantize, open_file)
    for part in checkpoint.components.values() or (checkpoint,):
        stated = not {"model_type", "architectures", "_class_name"}.isdisjoint(part.config)
        refuse_factors(part.path, part.tensors, stated=stated)
    return checkpoint


def _check_one_model(folder: Path) -> None:
    """Refuse a folder that holds both a full model and an adapter: either may be left over from earlier work."""
    adapters = [name for name in (*peft.WEIGHTS, *diffusion_loras.WEIGHTS) if is_there(folder / name, None)]
    if not adapters and not (folder / "adapter_config.json").is_file():
        return
    weights = find_weights(folder)
    if weights is None:
        return
    what = f"an adapter ({adapters[0]})" if adapters else "the config of an adapter (adapter_config.json)"
    names = [str(folder / name) for name in (weights.name, *adapters[:1])]
    raise InputError(
        f"{folder}: holds a full model ({weights.name}) and {what}: name the file that is meant: {' or '.join(names)}"
    )


def _check_numbers(adapter: Adapter) -> Adapter:
    """Return the adapter. Refuse it if a tensor holds no numbers that can be computed with."""
    for target, change in adapter.changes.items():
        for stored in change.tensors:
            if stored.dtype_name not in DTYPES or stored.dtype_name == "C64":
                raise FormatError(
                    f"{adapter.path}: {target} is changed by values of type {stored.dtype_name}: not read"
                )
    return adapter


def _bare_adapter(folder: Path, open_file: FileOpener) -> Path | None:
    """Return the adapter's file in a folder without a config: a standard name of adapters, or the only weights file."""
    named = next(
        (folder / name for name in (*peft.WEIGHTS, *diffusion_loras.WEIGHTS) if is_there(folder / name, None)), None
    )
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    if named is not None or len(found) != 1 or is_there(folder / "config.json"):
        return named
    return found[0] if dialect_of(open_file(check_inside(found[0], folder))) else None
