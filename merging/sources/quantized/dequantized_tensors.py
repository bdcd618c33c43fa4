"""Tensors that are computed from codes and scales, a piece at a time, as the reader asks for them."""

from __future__ import annotations

import copy

from typing_extensions import Self

from merging.maths.lazy_torch import Tensor, torch
from merging.maths.low_precision import from_codes, from_exponents, from_pairs
from merging.sources.derived import Derived
from merging.sources.quantized.scale_grid import ScaleGrid
from merging.sources.stored import Stored

__all__ = ["Cast", "Dequantized", "Mxfp4", "Scaled", "read_scales"]

_PIECE = 1 << 17
"""Approximate number of elements that are computed at a time."""


class Dequantized(Derived):
    """A quantised weight, read as ordinary numbers."""

    __slots__ = ()

    def as_float32(self) -> Self:
        """Return the same weight, read without the rounding to the type of the model's other weights."""
        exact = copy.copy(self)
        exact.dtype_name = "F32"
        return exact


class Cast(Dequantized):
    """Numbers of one byte, read as numbers of an ordinary type."""

    __slots__ = ("codes",)

    def __init__(self, dtype_name: str, codes: Stored) -> None:
        super().__init__(dtype_name, codes.shape, (codes,))
        self.codes = codes

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        for first in range(0, len(buffer), _PIECE):
            piece = buffer[first : first + _PIECE]
            codes = torch.empty(len(piece), dtype=self.codes.dtype)
            self.codes.read_into(codes, start + first)
            piece.copy_(from_codes(codes))

    def advise(self, start: int, count: int) -> None:
        self.codes.advise(start, count)


class Scaled(Dequantized):
    """Codes, each multiplied by the scale of its block: of a whole matrix, a row, a column, or a rectangle.

    ``value = code * scale * factor`` is computed in float32 and rounded once. Leading axes count matrices.
    """

    __slots__ = ("codes", "factor", "grid", "scales")

    def __init__(self, dtype_name: str, codes: Stored, scales: Stored, grid: ScaleGrid, factor: float = 1) -> None:
        super().__init__(dtype_name, codes.shape, (codes, scales))
        self.codes, self.scales, self.grid, self.factor = codes, scales, grid, factor

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        columns = max(1, self.shape[-1] if self.shape else 1)
        step = max(1, _PIECE // columns) * columns
        for position in range(start, start + len(buffer), step):
            piece = buffer[position - start : position - start + step]
            piece.copy_(self._values(position, len(piece), columns))

    def _values(self, start: int, count: int, columns: int) -> Tensor:
        codes = torch.empty(count, dtype=self.codes.dtype)
        self.codes.read_into(codes, start)
        first, last = start // columns, -(-(start + count) // columns)
        scales = self._rows_of_scales(first, last)
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.grid.steps[1], dim=1)[:, :columns]
        scales = scales.expand(-1, columns).reshape(-1)[start - first * columns :][:count]
        values = from_codes(codes).mul_(scales)
        return values.mul_(self.factor) if self.factor != 1 else values

    def _rows_of_scales(self, first: int, last: int) -> Tensor:
        """Return the scales of rows, numbered through all matrices: float32 ``[last - first, scales in a row]``."""
        grid, size = self.grid, self.grid.matrix[0]
        of = torch.arange(first, last)
        within = (of % size) // grid.steps[0]
        place = (of // size) * grid.rows + within if grid.matrices > 1 else within
        begin = int(place.min())
        count = (int(place.max()) + 1 - begin) * grid.columns
        return read_scales(self.scales, begin * grid.columns, count).view(-1, grid.columns)[place - begin]

    def advise(self, start: int, count: int) -> None:
        self.codes.advise(start, count)


class Mxfp4(Dequantized):
    """MXFP4 experts as gpt-oss stores them, read as ``[experts, inputs, outputs]`` like transformers' in memory.

    The codes ``blocks`` are ``[experts, outputs, groups, 16]``, two in a byte, the low one first. ``scales``
    ``[experts, outputs, groups]`` are the exponents of each group of 32 inputs, plus 127. Codes are stored by output,
    so that any piece of an expert needs all of its codes.
    """

    __slots__ = ("blocks", "scales")

    def __init__(self, dtype_name: str, blocks: Stored, scales: Stored) -> None:
        experts, outputs, groups, _ = blocks.shape
        super().__init__(dtype_name, (experts, groups * 32, outputs), (blocks, scales))
        self.blocks, self.scales = blocks, scales

    @property
    def scratch(self) -> int:
        return self.blocks.numel // max(1, self.shape[0])

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        _, inputs, outputs = self.shape
        expert_size = max(1, inputs * outputs)
        position, stop = start, start + len(buffer)
        while position < stop:
            expert = position // expert_size
            until = min(stop, (expert + 1) * expert_size)
            piece = buffer[position - start : until - start]
            self._expert(piece, expert, position - expert * expert_size)
            position = until

    def _expert(self, buffer: Tensor, expert: int, start: int) -> None:
        """Fill the buffer with an expert's elements from ``start`` on."""
        _, outputs, groups, _ = self.blocks.shape
        blocks = torch.empty(outputs * groups * 16, dtype=torch.uint8)
        self.blocks.read_into(blocks, expert * len(blocks))
        scales = torch.empty(outputs * groups, dtype=torch.uint8)
        self.scales.read_into(scales, expert * len(scales))
        codes, powers = blocks.view(outputs, groups, 16), from_exponents(scales).view(outputs, groups)
        size = 32 * outputs
        step = max(1, _PIECE // size)
        for first in range(start // size, -(-(start + len(buffer)) // size), step):
            some = slice(first, min(first + step, groups))
            values = from_pairs(codes[:, some]).mul_(powers[:, some, None]).reshape(outputs, -1).mT.reshape(-1)
            begin = max(start, first * size)
            end = min(start + len(buffer), first * size + len(values))
            buffer[begin - start : end - start] = values[begin - first * size : end - first * size]

    def advise(self, start: int, count: int) -> None:
        size = max(1, self.shape[1] * self.shape[2])
        first, last = start // size, -(-(start + count) // size)
        each = self.blocks.numel // max(1, self.shape[0])
        self.blocks.advise(first * each, (last - first) * each)


def read_scales(scales: Stored, start: int, count: int) -> Tensor:
    """Return stored scales from a flat offset on as float32: numbers, or bytes that are exponents of two."""
    bare = scales.dtype_name in ("F8_E8M0", "U8")  # read as bytes, whatever torch knows of them
    raw = torch.empty(count, dtype=torch.uint8 if bare else scales.dtype)
    scales.read_into(raw, start)
    return from_exponents(raw) if bare else raw.float()
