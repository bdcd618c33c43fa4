"""GGUF files: opened from their headers, and their tensors under the names and in the layout of transformers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from merging.errors import FormatError, QuantizedError, option
from merging.sources.gguf.architectures import ARCHITECTURES, DIFFUSION, Architecture
from merging.sources.gguf.header import GgufTensorInfo, count_in, read_gguf_header
from merging.sources.gguf.layout import Converted, HeadRows, Transposed
from merging.sources.gguf.model_config import heads_of, rebuild_config
from merging.sources.gguf.tensor_types import BlockTensor, is_dequantizable
from merging.sources.header import HeaderEntry
from merging.sources.open_files import File
from merging.sources.stored import FileContents, FileTensor, Stored
from merging.sources.tensor_views import view

__all__ = ["GgufModel", "is_lora", "open_gguf", "read_model"]

_NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are numbers of the config in transformers."""

_OLD_EXPERT = re.compile(r"blk\.[0-9]+\.ffn_(?:gate|up|down)\.[0-9]+\.weight")
"""Names of single experts in files of 2023."""


def open_gguf(path: Path) -> FileContents:
    """Open a GGUF file: its tensors by their names in it, and its metadata, numbers and lists as JSON.

    Quantised tensors are read as float32. Raises :class:`~merging.errors.FormatError` for a file that breaks the
    format, and :class:`~merging.errors.InputError` for quantised tensors where the package gguf is not installed.
    """
    file = File(path)
    header = read_gguf_header(file)
    return {name: _open_tensor(file, info) for name, info in header.tensors.items()}, header.metadata


def _open_tensor(file: File, info: GgufTensorInfo) -> Stored:
    if info.kind.dtype_name is not None:
        return FileTensor(file, HeaderEntry(info.kind.dtype_name, info.shape, info.start, info.nbytes))
    codes = FileTensor(file, HeaderEntry("U8", (info.nbytes,), info.start, info.nbytes))
    return BlockTensor(info.kind, info.shape, codes)


def is_lora(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata are of a LoRA, and not of a model."""
    return metadata.get("general.type") == "adapter"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A full model: its tensors and its config as transformers has them."""

    tensors: dict[str, Stored]
    config: dict[str, Any]


def read_model(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str], dequantize: bool) -> GgufModel:
    """Return a model under the names and in the layout of transformers, with a config made of the metadata.

    All floating-point tensors are read in one type: the type of most of the matrices, bfloat16 for a quantised model.

    Args:
        path: The file, for messages.
        tensors: The tensors by their names in the file.
        metadata: The metadata.
        dequantize: Whether quantised tensors are read as ordinary numbers.

    Raises:
        QuantizedError: for quantised tensors that are not to be dequantised, or cannot be.
        FormatError: for a model that is not understood.
    """
    _refuse_blocks(path, tensors, dequantize)
    name = metadata.get("general.architecture", "")
    if is_lora(metadata):
        raise FormatError(f"{path}: is a LoRA, and not a whole model")
    dtype_name = _main_dtype(tensors)
    if name in DIFFUSION:
        return GgufModel({each: _original(each, stored, metadata) for each, stored in tensors.items()}, {})
    if name == "llama" and metadata.get("llama.expert_count", "0") != "0":
        name = "mixtral"
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise FormatError(
            f"{path}: is a GGUF file of the architecture {name[:40]!r}, and read are "
            f"{', '.join(sorted(ARCHITECTURES))}, and diffusion models: merge the model it was made from"
        )
    config = rebuild_config(architecture, metadata, tensors, dtype_name=dtype_name, where=str(path))
    found: dict[str, Stored] = {}
    for each, stored in tensors.items():
        if each not in _NOT_WEIGHTS:
            found |= _rename(path, architecture, config, each, stored, dtype_name)
    return GgufModel(found, config)


def _refuse_blocks(path: Path, tensors: Mapping[str, Stored], dequantize: bool) -> None:
    blocks = {name: stored for name, stored in tensors.items() if isinstance(stored, BlockTensor)}
    if blocks and not dequantize:
        kinds = ", ".join(kind for kind, _ in Counter(each.kind.name for each in blocks.values()).most_common(3))
        raise QuantizedError(
            f"{path}: is quantised ({kinds}, says {next(iter(blocks))}): use {option('dequantize', True)} to merge it "
            f"as ordinary numbers, or merge the model it was made from, and quantise the result"
        )
    for name, stored in blocks.items():
        if not is_dequantizable(stored.kind):
            raise QuantizedError(
                f"{path}: {name} has the type {stored.kind.name}, which the package gguf does not dequantise: merge "
                f"the model it was made from, and quantise the result"
            )


def _main_dtype(tensors: Mapping[str, Stored]) -> str:
    """Return the type of most elements of the matrices, bfloat16 where they are quantised."""
    sizes: Counter[str] = Counter()
    for stored in tensors.values():
        if len(stored.shape) > 1:
            sizes["BF16" if isinstance(stored, BlockTensor) else stored.dtype_name] += stored.numel
    floating = [(name, size) for name, size in sizes.most_common() if name in ("F32", "F16", "BF16", "F64")]
    return floating[0][0] if floating else "F32"


def _convert(stored: Stored, dtype_name: str, added: float = 0.0) -> Stored:
    if not stored.floating or (stored.dtype_name == dtype_name and not added):
        return stored
    return Converted(stored, dtype_name, added)


def _original(name: str, stored: Stored, metadata: Mapping[str, str]) -> Stored:
    """Return a tensor of a diffusion model, in its shape before it was quantised."""
    stated = metadata.get(f"comfy.gguf.orig_shape.{name}", "").strip("[]").split(",")
    sizes = tuple(size for each in stated if (size := count_in(each.strip())) is not None)
    plain = _convert(stored, "BF16") if isinstance(stored, BlockTensor) else stored
    return view(plain, *sizes) if sizes and prod(sizes) == stored.numel else plain


def _rename(
    path: Path,
    architecture: Architecture,
    config: Mapping[str, Any],
    name: str,
    raw: Stored,
    dtype_name: str,
) -> dict[str, Stored]:
    """Return the tensors of transformers that a tensor of the file holds: one, or one for each expert."""
    renamed = architecture.name_in_transformers(name)
    if renamed is None:
        old = ": its experts are apart, as in files of 2023: convert the model again" if _OLD_EXPERT.match(name) else ""
        raise FormatError(f"{path}: {name[:80]} has no name in transformers' {architecture.model_class}{old}")
    target, module = renamed
    if architecture.is_shifted(target):
        return {target: _convert(raw, dtype_name, -1.0)}
    stored = _convert(raw, dtype_name)
    if module in architecture.experts:
        if len(stored.shape) != 3:
            raise FormatError(f"{path}: {name} has the shape {tuple(stored.shape)}, and should be a stack of experts")
        stack = view(stored)
        return {target.format(number): stack.select(number) for number in range(stored.shape[0])}
    if architecture.permuted and module in ("attn_q", "attn_k"):
        heads = heads_of(config, module)
        if heads < 1 or stored.shape[0] % (2 * heads):
            raise FormatError(f"{path}: {name} has {stored.shape[0]} rows, which do not make {heads} heads")
        return {target: HeadRows(stored, heads)}
    if module in architecture.transposed and len(stored.shape) == 2:
        return {target: Transposed(stored)}
    if module == "ffn_gate_inp_shexp" and len(stored.shape) == 1:
        return {target: view(stored, 1, *stored.shape)}
    return {target: stored}
