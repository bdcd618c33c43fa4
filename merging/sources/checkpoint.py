"""Full checkpoints: one file or shards with an index, safetensors or PyTorch's, known from their headers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from merging.errors import FormatError, InputError
from merging.sources.origin import Origin
from merging.sources.stored import Opened, Stored, open_tensors

__all__ = ["HEADS", "Checkpoint", "config_layers", "content_key", "files_key", "open_checkpoint", "read_json"]

_LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files that hold a model's weights, in the order in which transformers looks for them."""

HEADS = ("lm_head.weight", "embed_out.weight", "proj_out.weight", "output.weight")
"""What output heads are called, on models that may tie them to their input embedding."""

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight")

_TIED_TYPES = (
    "bart", "bert", "bloom", "cohere", "electra", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2",
    "gpt_neo", "mbart", "mt5", "opt", "roberta", "t5", "whisper",
)  # fmt: skip
"""Model types whose head is tied where their config does not mention it."""

_QUANTISED = {
    ".bitsandbytes__nf4": "bitsandbytes 4-bit",
    ".bitsandbytes__fp4": "bitsandbytes 4-bit",
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_inv": "block FP8",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "scaled FP8 or integers",
    ".weight_scale_2": "NVFP4",
    "_blocks": "MXFP4",
    ".W_q": "HQQ",
    ".codes": "AQLM",
}
"""The last part of the name of a tensor that goes with quantised weights."""

_LOOKED_AT, _SAMPLE = 1 << 11, 1 << 8
"""Tensors that a model's key is made of, at most, and the elements from the middle of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A full model: its tensors by their names on disk, and what its config says.

    ``folder`` is where its config and tokenizer lie, None for a bare file. ``shared`` names the tensors of a PyTorch
    file that are another one's memory.
    """

    path: Path
    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    shared: dict[str, str] = field(default_factory=dict)
    origin: Origin | None = None

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding: as the config states, or as its model type has it."""
        stated = _stated_tie(self.config)
        return self.config.get("model_type") in _TIED_TYPES if stated is None else stated

    @property
    def layers(self) -> int | None:
        """The number of blocks the config states, where it states one."""
        return config_layers(self.config)

    def lookup(self, name: str) -> Stored | None:
        """The tensor of that name; an output head that is not stored because it is tied is its embedding."""
        stored = self.tensors.get(name)
        if stored is None and self.tied and name.endswith(HEADS):
            embeddings = [t for n, t in self.tensors.items() if n.endswith(_EMBEDDINGS)]
            return embeddings[0] if len(embeddings) == 1 else None
        return stored


def _stated_tie(config: dict[str, Any]) -> bool | None:
    stated = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return None if stated is None else bool(stated)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model, which composite models keep in a config of its own."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def config_layers(config: dict[str, Any]) -> int | None:
    """The number of blocks that a model's config states, where it states one."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        value = text_config(config).get(key, config.get(key))
        if isinstance(value, int) and value > 0:
            return value
    return None


def open_checkpoint(path: Path, opened: Opened | None = None) -> Checkpoint:
    """Open a model's folder or weights file (``opened`` already, perhaps); headers are read, values are not.

    Raises :class:`~merging.errors.FormatError` for damaged or quantised files and for an index that does not agree
    with its shards, :class:`~merging.errors.InputError` for a folder without weights.
    """
    weights = path if path.is_file() else _weights_of(path)
    named = weights.name in _LAYOUTS
    folder = weights.parent if path.is_dir() or (named and (weights.parent / "config.json").is_file()) else None
    config = read_json(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
    files = _shards(weights) if weights.suffix == ".json" else {weights: None}
    tensors: dict[str, Stored] = {}
    shared: dict[str, str] = {}
    for file, expected in files.items():
        pickled = file.suffix in (".bin", ".pt", ".pth")
        found, extra = opened or open_tensors(file)
        if expected is not None:
            _agree(weights, file, expected, set(found))
        tensors.update(found)
        shared.update(extra if pickled else {})
    if not tensors:
        raise FormatError(f"{path}: holds no tensors")
    _refuse_quantised(path, tensors, config)
    checkpoint = Checkpoint(path, tensors, tuple(files), config, folder, shared)
    # A PyTorch file repeats tied weights under every name; written once, transformers ties them again.
    for name in shared if _stated_tie(config) is not False else ():
        del tensors[name]
    return checkpoint


def _weights_of(folder: Path) -> Path:
    for name in _LAYOUTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    holds = ", ".join(p.name for p in found) if found else "none of model.safetensors, its index, pytorch_model.bin"
    raise InputError(f"{folder}: which weights? The folder holds {holds}: name the file")


def _shards(index: Path) -> dict[Path, set[str]]:
    """The tensor names that an index promises for each of its shards."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no weight_map, so it is no index of shards")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard:
            raise FormatError(f"{index}: {name} is said to be in {shard!r}, which is no plain file name")
        shards.setdefault(index.parent / shard, set()).add(name)
    for shard_path in shards:
        if not shard_path.is_file():
            raise FormatError(f"{index}: its shard {shard_path.name} is missing: complete the download")
    return dict(sorted(shards.items()))


def _agree(index: Path, shard: Path, promised: set[str], found: set[str]) -> None:
    missing, extra = sorted(promised - found), sorted(found - promised)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the index does not list"
        more = len(missing) + len(extra) - 1
        raise FormatError(
            f"{shard}: {what}{f' (and {more} more such names)' if more else ''}: {index.name} and its shards come from "
            f"different saves, get them again together"
        )


def _refuse_quantised(path: Path, tensors: dict[str, Stored], config: dict[str, Any]) -> None:
    stated = config.get("quantization_config") or text_config(config).get("quantization_config")
    way_out = "merge the model it was made from, and quantise the result"
    if isinstance(stated, dict):
        kind = stated.get("quant_method", "unknown method")
        raise FormatError(f"{path}: is quantised ({kind}, says its config): {way_out}")
    for name, stored in tensors.items():
        # Only the tail of the name is compared: 50,000 names times 13 endings would be felt.
        tail = name[name.rfind(".") :] if not name.endswith("_blocks") else "_blocks"
        if tail in _QUANTISED:
            raise FormatError(f"{path}: is quantised ({_QUANTISED[tail]}, says {name}): {way_out}")
        if stored.kind.startswith(("F8_", "F6_")) or stored.kind == "F4":
            raise FormatError(f"{path}: {name} holds {stored.kind} codes, so the model is quantised: {way_out}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises :class:`~merging.errors.FormatError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: should hold a JSON object, and holds a {type(value).__name__}")
    return value


def content_key(tensors: Mapping[str, Stored]) -> str:
    """A short key of a model's content: what its tensors are, and a few values of each, so that 100 GB cost nothing.

    The same for any shards and any order. Of very many tensors an even choice is looked at.
    """
    digest = hashlib.sha256()
    names = sorted(tensors)
    stride = -(-len(names) // _LOOKED_AT) or 1
    for number, name in enumerate(names):
        stored = tensors[name]
        digest.update(f"{name} {stored.kind} {stored.shape}\n".encode())
        if number % stride == 0:
            values = torch.empty(min(_SAMPLE, stored.numel), dtype=stored.dtype)
            stored.read_into(values, (stored.numel - len(values)) // 2)
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def files_key(tensors: Mapping[str, Stored]) -> str:
    """A short key of the content of files that have not come yet, by what their repository states of them."""
    return hashlib.sha256("".join(sorted({stored.source() for stored in tensors.values()})).encode()).hexdigest()[:16]
