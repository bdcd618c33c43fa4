"""Tensors that are computed from codes and scales, a piece at a time, as the reader asks for them."""

from __future__ import annotations

from math import prod

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.stored import Stored

__all__ = ["Cast", "Mxfp4", "Scaled", "fits"]

_PIECE = 1 << 17
"""Approximate number of elements that are computed at a time."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that four bits stand for; the highest bit is the sign."""


def fits(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether scales of a shape fit codes of a shape: one for all, for each row or column, or for each block."""
    if len(shape) < 2:
        return prod(scales) == 1
    matrices = prod(shape[:-2])
    return (
        len(scales) <= len(shape)
        and (count := _as_matrices(shape, scales))[0] in (1, matrices)
        and all(_step(size, steps, each) for size, steps, each in zip(shape[-2:], count[1:], block, strict=True))
    )


def _as_matrices(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape of scales as ``[matrices, rows, columns]``, with 1 for missing axes at the end."""
    given = scales if prod(scales) != 1 else ()
    padded = (*given, *(1,) * (len(shape) - len(given)))
    return prod(padded[:-2]), padded[-2], padded[-1]


def _step(size: int, steps: int, block: int) -> int:
    """Return how many entries of an axis share a scale; 0 if the number of scales does not fit the axis."""
    if steps == 1:
        return max(1, size)
    return 1 if steps == size else block if steps == -(-size // block) else 0


class Cast(Derived):
    """Numbers of one byte, read as numbers of an ordinary type."""

    __slots__ = ("_codes",)

    def __init__(self, dtype_name: str, codes: Stored) -> None:
        super().__init__(dtype_name, codes.shape, (codes,))
        self._codes = codes

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        for first in range(0, len(buffer), _PIECE):
            piece = buffer[first : first + _PIECE]
            codes = torch.empty(len(piece), dtype=self._codes.dtype)
            self._codes.read_into(codes, start + first)
            piece.copy_(_numbers(codes))

    def advise(self, start: int, count: int) -> None:
        self._codes.advise(start, count)


class Scaled(Derived):
    """Codes, each multiplied by the scale of its block: of a whole matrix, a row, a column, or a rectangle.

    ``value = code * scale * factor`` is computed in float32 and rounded once. Leading axes count matrices.
    """

    __slots__ = ("_codes", "_factor", "_grid", "_scales", "_steps")

    def __init__(
        self, dtype_name: str, codes: Stored, scales: Stored, block: tuple[int, int], factor: float = 1
    ) -> None:
        super().__init__(dtype_name, codes.shape, (codes, scales))
        self._codes, self._scales, self._factor = codes, scales, factor
        matrix = codes.shape[-2:] if len(codes.shape) > 1 else (1, codes.numel)
        self._grid = _as_matrices((1, 1, *codes.shape)[-max(2, len(codes.shape)) :], scales.shape)
        self._steps = tuple(_step(*each) for each in zip(matrix, self._grid[1:], block, strict=True))

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        columns = max(1, self.shape[-1] if self.shape else 1)
        step = max(1, _PIECE // columns) * columns
        for position in range(start, start + len(buffer), step):
            piece = buffer[position - start : position - start + step]
            piece.copy_(self._values(position, len(piece), columns))

    def _values(self, start: int, count: int, columns: int) -> Tensor:
        codes = torch.empty(count, dtype=self._codes.dtype)
        self._codes.read_into(codes, start)
        first, last = start // columns, -(-(start + count) // columns)
        scales = self._rows_of_scales(first, last)
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self._steps[1], dim=1)[:, :columns]
        scales = scales.expand(-1, columns).reshape(-1)[start - first * columns :][:count]
        values = _numbers(codes).mul_(scales)
        return values.mul_(self._factor) if self._factor != 1 else values

    def _rows_of_scales(self, first: int, last: int) -> Tensor:
        """Return the scales of rows, numbered through all matrices: float32 ``[last - first, scales in a row]``."""
        matrices, rows, width = self._grid
        of = torch.arange(first, last)
        size = self.shape[-2] if len(self.shape) > 1 else 1
        within = (of % size) // self._steps[0]
        place = (of // size) * rows + within if matrices > 1 else within
        begin = int(place.min())
        raw = torch.empty((int(place.max()) + 1 - begin) * width, dtype=_storage(self._scales))
        self._scales.read_into(raw, begin * width)
        scales = _powers(raw) if self._scales.dtype_name in ("F8_E8M0", "U8") else raw.float()
        return scales.view(-1, width)[place - begin]

    def advise(self, start: int, count: int) -> None:
        self._codes.advise(start, count)


class Mxfp4(Derived):
    """MXFP4 experts as gpt-oss stores them, read as ``[experts, inputs, outputs]`` like transformers' in memory.

    The codes ``blocks`` are ``[experts, outputs, groups, 16]``, two in a byte, the low one first. ``scales``
    ``[experts, outputs, groups]`` are the exponents of each group of 32 inputs, plus 127. Codes are stored by output,
    so that any piece of an expert needs all of its codes.
    """

    __slots__ = ("_blocks", "_scales")

    def __init__(self, dtype_name: str, blocks: Stored, scales: Stored) -> None:
        experts, outputs, groups, _ = blocks.shape
        super().__init__(dtype_name, (experts, groups * 32, outputs), (blocks, scales))
        self._blocks, self._scales = blocks, scales

    @property
    def scratch(self) -> int:
        return self._blocks.numel // max(1, self.shape[0])

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
        _, outputs, groups, _ = self._blocks.shape
        blocks = torch.empty(outputs * groups * 16, dtype=torch.uint8)
        self._blocks.read_into(blocks, expert * len(blocks))
        scales = torch.empty(outputs * groups, dtype=torch.uint8)
        self._scales.read_into(scales, expert * len(scales))
        codes, powers = blocks.view(outputs, groups, 16), _powers(scales).view(outputs, groups)
        size = 32 * outputs
        step = max(1, _PIECE // size)
        for first in range(start // size, -(-(start + len(buffer)) // size), step):
            some = slice(first, min(first + step, groups))
            values = _pairs(codes[:, some]).mul_(powers[:, some, None]).reshape(outputs, -1).mT.reshape(-1)
            begin = max(start, first * size)
            end = min(start + len(buffer), first * size + len(values))
            buffer[begin - start : end - start] = values[begin - first * size : end - first * size]

    def advise(self, start: int, count: int) -> None:
        size = max(1, self.shape[1] * self.shape[2])
        first, last = start // size, -(-(start + count) // size)
        each = self._blocks.numel // max(1, self.shape[0])
        self._blocks.advise(first * each, (last - first) * each)


def _storage(scales: Stored) -> torch.dtype:
    """Return the dtype in which scales are read: bare exponents are bytes, whatever torch knows of them."""
    return torch.uint8 if scales.dtype_name == "F8_E8M0" else scales.dtype


def _powers(exponents: Tensor) -> Tensor:
    """Return 2 to the power of each exponent, which is stored as a byte, plus 127."""
    table = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
    return table.index_select(0, exponents.int())


def _numbers(codes: Tensor) -> Tensor:
    """Return codes of one byte as float32."""
    if codes.dtype == torch.int8:
        return codes.float()
    # looked up, which is four times as fast as converting them
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).int())


def _pairs(codes: Tensor) -> Tensor:
    """Return bytes ``[..., n]`` of two codes each as float32 ``[..., 2 n]``, the low four bits first."""
    values = torch.tensor([*_E2M1, *(-each for each in _E2M1)])
    table = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    return table.index_select(0, codes.reshape(-1).int()).view(*codes.shape[:-1], -1)
