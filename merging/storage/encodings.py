"""Encodings of quantised outputs: merged numbers to codes and scales, a part of a tensor at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, prod
from typing import NamedTuple

from merging.errors import InputError, option
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.low_precision import (
    LIMITS,
    exponents_of,
    from_codes,
    from_exponents,
    from_pairs,
    to_codes,
    to_exponents,
    to_pairs,
)
from merging.sources.dtypes import DTYPES
from merging.sources.quantized.dequantized_tensors import read_scales
from merging.sources.quantized.scale_grid import ScaleGrid
from merging.sources.stored import Stored
from merging.storage.output_tensor import OutputTensor

__all__ = ["Encoding", "GroupEncoding", "Loss", "ScaledEncoding"]

_PIECE = 1 << 18
"""Approximate number of elements that are encoded at a time."""

_EXPONENTS = ("F8_E8M0", "U8")
"""Types of scales that are bare exponents of two."""

Write = Callable[[str, Tensor, int], None]
"""Receives elements of a tensor of the file, from a position on."""


class Loss(NamedTuple):
    """The squared error of encoded numbers, and the sum of their squares."""

    error: float
    total: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Encoding(ABC):
    """How a merged tensor is encoded.

    Attributes:
        name: the merged tensor.
        shape: its shape.
        codes: the tensor of the file for its codes.
        scales: the tensor of the file for its scales; None where codes are numbers by themselves.
        former: the scales that the base has, which are kept where they hold the merged numbers exactly.
        label: the format's name, for people.
    """

    name: str
    shape: tuple[int, ...]
    codes: OutputTensor
    scales: OutputTensor | None
    former: Stored | None = None
    label: str

    @property
    def outs(self) -> tuple[OutputTensor, ...]:
        """The tensors of the file."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    @abstractmethod
    def unit(self, position: int) -> tuple[int, int]:
        """Return the range of elements around a position that are encoded together."""

    @property
    def largest_unit(self) -> int:
        """The number of elements of the largest unit."""
        first, last = self.unit(0)
        return last - first

    def encode(self, values: Tensor, start: int, write: Write) -> Loss:
        """Encode a unit of float32 values that begins at ``start``, and write its codes and scales.

        Raises :class:`~merging.errors.InputError` for values that the format cannot hold.
        """
        low, high = (float(each) for each in torch.aminmax(values)) if len(values) else (0.0, 0.0)
        if not (isfinite(low) and isfinite(high)):
            raise InputError(
                f"{self.name}: holds NaN or infinite values, which {self.label} cannot hold: leave the tensor out with "
                f"{option('exclude')}, or write ordinary numbers with {option('quantize', 'none')}"
            )
        return self._encode(values, start, write)

    @abstractmethod
    def _encode(self, values: Tensor, start: int, write: Write) -> Loss:
        """Encode a unit of finite values."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScaledEncoding(Encoding):
    """Codes of one byte, each multiplied by the scale of its matrix, row, column or block.

    A scale is the largest magnitude of its codes' numbers, divided by the largest code. It is written in the type of
    ``scales``, and codes are the nearest for the scale as it is written. A block of zeros has the scale 1.

    Attributes:
        grid: which codes share a scale.
        factor: a constant that readers multiply all numbers by.
        powers: whether scales are powers of two.
    """

    grid: ScaleGrid
    factor: float = 1.0
    powers: bool = False

    def unit(self, position: int) -> tuple[int, int]:
        """Return the rows of scales around a position, several where they are short."""
        rows, columns = self.grid.matrix
        size = rows * columns
        step = self.grid.steps[0]
        height = min(rows, step * max(1, _PIECE // (step * columns)))
        matrix, within = divmod(position, size)
        first = within // (height * columns) * height * columns
        return matrix * size + first, matrix * size + min(first + height * columns, size)

    def _encode(self, values: Tensor, start: int, write: Write) -> Loss:
        columns = self.grid.matrix[1]
        matrix, first = divmod(start // columns, self.grid.matrix[0])
        rows = values.view(-1, columns)
        place = (matrix * self.grid.rows + first // self.grid.steps[0]) * self.grid.columns
        scales, stored = self._choose_scales(rows)
        if self.former is not None and self.scales is not None:
            scales, stored = self._keep_former(rows, scales, stored, place)
        error = total = 0.0
        for top, piece in self._pieces(rows):
            spread = self._spread(scales, top, len(piece))
            codes = to_codes(piece / spread, DTYPES[self.codes.dtype_name], self._limit)
            write(self.codes.name, codes.reshape(-1), start + top * columns)
            lost = from_codes(codes).mul_(spread).sub_(piece)
            error += _squared_norm(lost)
            total += _squared_norm(piece)
        if self.scales is not None:
            write(self.scales.name, stored.reshape(-1), place)
        return Loss(error, total)

    @property
    def _limit(self) -> float:
        return LIMITS[self.codes.dtype_name]

    def _pieces(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield rows in pieces, of whole blocks where these are shorter than the unit."""
        step = min(self.grid.steps[0], len(rows))
        height = max(1, _PIECE // rows.shape[1])
        height = -(-height // step) * step if step < len(rows) else height
        for top in range(0, len(rows), height):
            yield top, rows[top : top + height]

    def _choose_scales(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales of a unit as readers use them, and as they are stored: ``[rows, columns]`` of scales."""
        if self.scales is None:
            one = torch.ones(1, 1)
            if float(torch.maximum(rows.max(), -rows.min())) > self._limit:
                raise InputError(
                    f"{self.name}: the merged values are beyond the range of {self.codes.dtype_name}, which is stored "
                    f"without scales: write ordinary numbers with {option('quantize', 'none')}"
                )
            return one, one
        scales = self._magnitudes(rows) / (self._limit * self.factor)
        kind = self.scales.dtype_name
        tiny = torch.finfo(torch.float32 if kind in _EXPONENTS else DTYPES[kind]).tiny
        scales = torch.where(scales > 0, scales.clamp_min_(tiny), 1.0)
        if kind in _EXPONENTS:
            stored = to_exponents(scales)
            return from_exponents(stored), stored
        if self.powers:
            scales = from_exponents(to_exponents(scales))
        stored = scales.to(DTYPES[kind])
        if not bool(stored.isfinite().all()):
            raise InputError(
                f"{self.name}: the merged values are too large for scales in {kind}: write ordinary numbers with "
                f"{option('quantize', 'none')}"
            )
        return stored.float(), stored

    def _magnitudes(self, rows: Tensor) -> Tensor:
        """Return the largest magnitude of the numbers of each scale."""
        down, across = self.grid.steps
        found = torch.zeros(-(-len(rows) // down), -(-rows.shape[1] // across))
        for top, piece in self._pieces(rows):
            blocks = self._blocks(piece.abs()).amax((1, 3))
            some = found[top // down :][: len(blocks)]
            torch.maximum(some, blocks, out=some)
        return found

    def _blocks(self, piece: Tensor) -> Tensor:
        """Return rows by blocks: ``[blocks down, rows, blocks across, columns]``, filled up with zeros."""
        down, across = min(self.grid.steps[0], len(piece)), self.grid.steps[1]
        missing = -piece.shape[1] % across, -len(piece) % down
        if any(missing):
            piece = torch.nn.functional.pad(piece, (0, missing[0], 0, missing[1]))
        return piece.view(len(piece) // down, down, -1, across)

    def _keep_former(self, rows: Tensor, scales: Tensor, stored: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Return the scales with the base's own for blocks that these hold exactly, as where nothing changed."""
        assert self.former is not None
        former = read_scales(self.former, place, scales.numel()).view(scales.shape)
        usable = former.isfinite() & (former > 0)
        trial = torch.where(usable, former, 1.0)
        for top, piece in self._pieces(rows):
            spread = self._spread(trial, top, len(piece))
            codes = to_codes(piece / spread, DTYPES[self.codes.dtype_name], self._limit)
            changed = self._blocks((from_codes(codes).mul_(spread) != piece).byte()).amax((1, 3))
            usable[top // self.grid.steps[0] :][: len(changed)] &= changed == 0
        kept = torch.where(usable, former, scales)
        if stored.dtype == torch.uint8:
            return kept, torch.where(usable, to_exponents(trial), stored)
        return kept, torch.where(usable, former.to(stored.dtype), stored)

    def _spread(self, scales: Tensor, top: int, count: int) -> Tensor:
        """Return the scale of each number of rows, with the factor."""
        down, across = self.grid.steps
        spread = scales[torch.arange(top, top + count) // down]
        if spread.shape[1] > 1:
            spread = spread.repeat_interleave(across, dim=1)[:, : self.grid.matrix[1]]
        return spread * self.factor if self.factor != 1 else spread


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GroupEncoding(Encoding):
    """MXFP4 of experts ``[experts, inputs, outputs]`` as gpt-oss stores them: groups of 32 inputs share an exponent."""

    def unit(self, position: int) -> tuple[int, int]:
        """Return the expert around a position."""
        size = max(1, prod(self.shape[1:]))
        expert = position // size
        return expert * size, (expert + 1) * size

    def _encode(self, values: Tensor, start: int, write: Write) -> Loss:
        assert self.scales is not None
        _, inputs, outputs = self.shape
        groups = inputs // 32
        expert = start // (inputs * outputs)
        matrix = values.view(inputs, outputs)
        error = total = 0.0
        step = max(1, _PIECE // inputs)
        for first in range(0, outputs, step):
            columns = matrix[:, first : first + step].mT.contiguous().view(-1, groups, 32)
            position = expert * outputs * groups + first * groups
            stored = exponents_of(columns.abs().amax(2))
            if self.former is not None:
                stored = self._keep_former(columns, stored, position)
            scales = from_exponents(stored).unsqueeze(2)
            codes = to_pairs(columns / scales)
            write(self.codes.name, codes.reshape(-1), position * 16)
            write(self.scales.name, stored.reshape(-1), position)
            lost = from_pairs(codes).mul_(scales).sub_(columns)
            error += _squared_norm(lost)
            total += _squared_norm(columns)
        return Loss(error, total)

    def _keep_former(self, groups: Tensor, stored: Tensor, position: int) -> Tensor:
        """Return the exponents with the base's own for groups that these hold exactly."""
        assert self.former is not None
        former = torch.empty(stored.numel(), dtype=torch.uint8)
        self.former.read_into(former, position)
        former = former.view(stored.shape)
        scales = from_exponents(former).unsqueeze(2)
        same = (from_pairs(to_pairs(groups / scales)).mul_(scales) == groups).all(2)
        return torch.where(same, former, stored)


def _squared_norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
