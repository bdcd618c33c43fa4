"""The types of tensors in GGUF files, and quantised tensors that are read as ordinary numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from merging.errors import InputError
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.stored import Stored

__all__ = ["BlockTensor", "BlockType", "block_type", "gguf_package", "is_dequantizable"]

_PIECE = 1 << 17
"""Approximate number of elements that are dequantised at a time."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of tensors: blocks of ``elements`` numbers in ``nbytes`` bytes.

    ``dtype_name`` is the type as safetensors files name it; None for quantised types.
    """

    name: str
    number: int
    elements: int
    nbytes: int
    dtype_name: str | None = None


_ORDINARY = {
    number: BlockType(name, number, 1, nbytes, name)
    for number, name, nbytes in (
        (0, "F32", 4), (1, "F16", 2), (24, "I8", 1), (25, "I16", 2), (26, "I32", 4), (27, "I64", 8), (28, "F64", 8),
        (30, "BF16", 2),
    )
}  # fmt: skip


def gguf_package() -> Any:
    """Return the package gguf. Raises :class:`~merging.errors.InputError` where it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise InputError(
            "quantised GGUF files are read, and GGUF files written, by the package gguf: pip install 'merging[gguf]'"
        ) from None
    return gguf


@cache
def block_type(number: int) -> BlockType | None:
    """Return the type of a number in files, None for a number that no type has."""
    if number in _ORDINARY:
        return _ORDINARY[number]
    package = gguf_package()
    try:
        kind = package.GGMLQuantizationType(number)
        elements, nbytes = package.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return None
    return BlockType(kind.name, number, elements, nbytes)


@cache
def is_dequantizable(kind: BlockType) -> bool:
    """Whether the package gguf dequantises a type."""
    package = gguf_package()
    block = torch.zeros((1, kind.nbytes), dtype=torch.uint8).numpy()
    try:
        package.quants.dequantize(block, package.GGMLQuantizationType(kind.number))
    except NotImplementedError:
        return False
    return True


class BlockTensor(Derived):
    """A quantised tensor, read as ordinary numbers block by block, as llama.cpp's own package dequantises it."""

    __slots__ = ("_codes", "kind")

    def __init__(self, kind: BlockType, shape: tuple[int, ...], codes: Stored) -> None:
        super().__init__("F32", shape, (codes,))
        self.kind, self._codes = kind, codes

    @property
    def quantized(self) -> str | None:
        return self.kind.name

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        elements, nbytes = self.kind.elements, self.kind.nbytes
        step = max(1, _PIECE // elements) * elements
        package = gguf_package()
        kind = package.GGMLQuantizationType(self.kind.number)
        position, stop = start, start + len(buffer)
        while position < stop:
            first = position // elements
            end = min(stop, first * elements + step)
            last = -(-end // elements)
            codes = torch.empty((last - first) * nbytes, dtype=torch.uint8)
            self._codes.read_into(codes, first * nbytes)
            values = package.quants.dequantize(codes.numpy().reshape(last - first, nbytes), kind)
            skipped = position - first * elements
            numbers = torch.from_numpy(values).reshape(-1)[skipped : skipped + end - position]
            buffer[position - start : end - start].copy_(numbers)
            position = end

    def advise(self, start: int, count: int) -> None:
        first = start // self.kind.elements
        last = -(-(start + count) // self.kind.elements)
        self._codes.advise(first * self.kind.nbytes, (last - first) * self.kind.nbytes)
