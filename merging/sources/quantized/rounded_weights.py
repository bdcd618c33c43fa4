"""Weights as bitsandbytes would quantise and dequantise them, computed piece by piece while they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.dtypes import DTYPES
from merging.sources.quantized.bitsandbytes_codes import (
    FourBitFormat,
    block_scales,
    dequantize_blocks,
    dequantize_scales,
    quantize_blocks,
    quantize_scales,
    value_table,
)
from merging.sources.stored import MappedTensor, Stored

__all__ = ["GROUP", "FourBitRounded", "FourBitScheme", "Int8Rounded", "TurnedRounded"]

GROUP = 256
"""Scales that share a scale, where they are quantised again."""

_PIECE = 1 << 18
_BUFFERS = 10
"""Buffers of four bytes a value that rounding a piece takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitScheme:
    """How bitsandbytes quantises to 4 bits.

    Attributes:
        format: the format of the codes.
        block: the number of values that share a scale.
        double: whether the scales are quantised again (double quantisation).
        dtype_name: the dtype that the weights had, which they have again when they are dequantised.
        nearest: whether scales get the nearest code, as on GPUs, and not one as the library for CPUs finds it.
    """

    format: FourBitFormat
    block: int = 64
    double: bool
    dtype_name: str
    nearest: bool = True

    @property
    def unit(self) -> int:
        """The number of values that are quantised together, once the mean of all scales is known."""
        return self.block * (GROUP if self.double else 1)


class FourBitRounded(Derived):
    """A weight rounded to 4 bits. With double quantisation all of it is read first, for the mean of its scales."""

    __slots__ = ("_lock", "_mean", "_of", "_scheme")

    def __init__(self, of: Stored, scheme: FourBitScheme) -> None:
        super().__init__(scheme.dtype_name, of.shape, (of,))
        self._of, self._scheme = of, scheme
        self._mean: Tensor | None = None
        self._lock = Lock()

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        unit, stop = self._scheme.unit, start + len(buffer)
        step = max(1, _PIECE // unit) * unit
        for first in range(start - start % unit, stop, step):
            last = min(first + step, -(-stop // unit) * unit, self.numel)
            values = self._round(self._values(first, last))
            begin, end = max(start, first), min(stop, last)
            buffer[begin - start : end - start] = values[begin - first : end - first]

    def _values(self, start: int, stop: int) -> Tensor:
        """Return values of the weight in its dtype at the quantisation, as float32."""
        raw = torch.empty(stop - start, dtype=self._of.dtype)
        self._of.read_into(raw, start)
        return raw.to(self.dtype).float()

    def _round(self, values: Tensor) -> Tensor:
        """Return values from the beginning of a unit on, quantised and dequantised."""
        scheme = self._scheme
        codes, scales = quantize_blocks(values, scheme.block, scheme.format)
        if scheme.double:
            mean = self._mean_scale()
            scale_codes, table, groups = quantize_scales(scales, GROUP, mean, nearest=scheme.nearest)
            places = torch.arange(len(scales)) // GROUP
            scales = dequantize_scales(scale_codes, table, groups[places], mean)
        each = scales.repeat_interleave(scheme.block)[: len(codes)]
        return dequantize_blocks(codes, value_table(scheme.format), each).to(self.dtype)

    def _mean_scale(self) -> Tensor:
        with self._lock:
            if self._mean is None:
                block = self._scheme.block
                step = max(1, _PIECE // block) * block
                pieces = (self._values(first, min(first + step, self.numel)) for first in range(0, self.numel, step))
                self._mean = torch.cat([block_scales(piece, block) for piece in pieces]).mean()
            return self._mean

    @property
    def scratch(self) -> int:
        return _BUFFERS * 4 * _PIECE + (4 * self.numel // self._scheme.block if self._scheme.double else 0)

    def advise(self, start: int, count: int) -> None:
        self._of.advise(start, count)


class Int8Rounded(Derived):
    """A weight rounded to 8 bits by rows, as LLM.int8 stores it, in float32: ``code * largest of the row / 127``.

    Whatever its dtype, bitsandbytes quantises it from float16.
    """

    __slots__ = ("_of",)

    def __init__(self, of: Stored) -> None:
        super().__init__("F32", of.shape, (of,))
        self._of = of

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        columns, stop = max(1, self.shape[-1]), start + len(buffer)
        step = max(1, _PIECE // columns) * columns
        for first in range(start - start % columns, stop, step):
            last = min(first + step, -(-stop // columns) * columns)
            raw = torch.empty(last - first, dtype=self._of.dtype)
            self._of.read_into(raw, first)
            values = _round_rows(raw.half().view(-1, columns)).view(-1)
            begin, end = max(start, first), min(stop, last)
            buffer[begin - start : end - start] = values[begin - first : end - first]

    @property
    def scratch(self) -> int:
        return _BUFFERS * 4 * max(_PIECE, self.shape[-1])

    def advise(self, start: int, count: int) -> None:
        self._of.advise(start, count)


def _round_rows(rows: Tensor) -> Tensor:
    """Return float16 rows, quantised and dequantised, in float32."""
    largest = rows.abs().amax(dim=1, keepdim=True).float()
    codes = torch.round(rows * (127.0 / largest)).nan_to_num_(0.0)  # of a row of zeros
    return codes.mul_(largest).mul_(1 / 127)


class TurnedRounded(Derived):
    """A weight that is stored as inputs by outputs, and rounded as outputs by inputs.

    It is rounded as a whole, and kept until all of it was read once.
    """

    __slots__ = ("_left", "_lock", "_of", "_round", "_whole")

    def __init__(self, of: Stored, round_weight: Callable[[Stored], Stored]) -> None:
        super().__init__(round_weight(of).dtype_name, of.shape, (of,))
        self._of, self._round = of, round_weight
        self._whole: Tensor | None = None
        self._left = 0
        self._lock = Lock()

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        with self._lock:
            if self._whole is None:
                turned = MappedTensor(self._of.read().mT.contiguous(), self._of.order())
                self._whole, self._left = self._round(turned).read().mT.contiguous().view(-1), self.numel
            buffer.copy_(self._whole[start : start + len(buffer)])
            self._left -= len(buffer)
            if self._left <= 0:
                self._whole = None

    @property
    def scratch(self) -> int:
        return self.numel * (2 * self._of.dtype.itemsize + 2 * DTYPES[self.dtype_name].itemsize)
