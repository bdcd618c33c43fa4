"""Weights of several codes a byte or word, with scales and zero points for groups of inputs: rows as they are read."""

from __future__ import annotations

from abc import abstractmethod

from merging.errors import FormatError
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.low_precision import from_pairs
from merging.sources.quantized.dequantized_tensors import Dequantized, read_scales
from merging.sources.stored import Stored

__all__ = ["Awq", "Gptq", "PackedFloats", "PackedIntegers"]

_PIECE = 1 << 17
"""Approximate number of elements that are computed at a time."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The places of eight consecutive outputs among the four-bit codes of a word of AWQ, the lowest bits first."""


class _RowWise(Dequantized):
    """A weight ``[..., outputs, inputs]`` that is computed by rows."""

    __slots__ = ()

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        columns, position = self.shape[-1], start
        step = max(1, _PIECE // columns)
        while position < start + len(buffer):
            first = position // columns
            last = min(first + step, -(-(start + len(buffer)) // columns))
            values = self._rows(first, last).reshape(-1)[position - first * columns :]
            until = min(position + len(values), start + len(buffer))
            buffer[position - start : until - start] = values[: until - position]
            position = until

    @abstractmethod
    def _rows(self, first: int, last: int) -> Tensor:
        """Return rows, numbered through all matrices: float32 ``[last - first, inputs]``."""


class PackedFloats(_RowWise):
    """NVFP4, and MXFP4 of compressed-tensors: codes of four bits, two in a byte, ``[..., outputs, inputs / 2]``.

    Scales ``[..., outputs, groups]`` are E4M3 or exponents of two. ``whole`` multiplies all scales, or divides them if
    ``divides``.
    """

    __slots__ = ("_codes", "_divides", "_scales", "_whole")

    def __init__(self, dtype_name: str, codes: Stored, scales: Stored, whole: Stored | None, divides: bool) -> None:
        parts = (codes, scales) if whole is None else (codes, scales, whole)
        super().__init__(dtype_name, (*codes.shape[:-1], 2 * codes.shape[-1]), parts)
        self._codes, self._scales, self._whole, self._divides = codes, scales, whole, divides

    def _rows(self, first: int, last: int) -> Tensor:
        width, groups = self._codes.shape[-1], self._scales.shape[-1]
        codes = torch.empty((last - first) * width, dtype=torch.uint8)
        self._codes.read_into(codes, first * width)
        scales = read_scales(self._scales, first * groups, (last - first) * groups).view(-1, groups)
        if self._whole is not None:
            whole = read_scales(self._whole, 0, 1)
            scales = scales / whole if self._divides else scales * whole
        values = from_pairs(codes).view(len(scales), groups, -1)
        return values.mul_(scales.unsqueeze(2)).view(len(scales), -1)


class PackedIntegers(_RowWise):
    """Integers of compressed-tensors packed into words, ``[outputs, inputs * bits / 32]``, the lowest bits first.

    ``value = (code - zero) * scale``, with a scale and a zero for each group of inputs, or the middle code as zero.
    """

    __slots__ = ("_bits", "_codes", "_groups", "_scales", "_zeros")

    def __init__(
        self,
        dtype_name: str,
        shape: tuple[int, int],
        *,
        bits: int,
        codes: Stored,
        scales: Stored,
        zeros: Stored | None,
        groups: Stored | None,
    ) -> None:
        super().__init__(dtype_name, shape, tuple(each for each in (codes, scales, zeros, groups) if each is not None))
        self._bits, self._codes, self._scales, self._zeros, self._groups = bits, codes, scales, zeros, groups

    def _rows(self, first: int, last: int) -> Tensor:
        rows, inputs = last - first, self.shape[1]
        width, groups = self._codes.shape[1], self._scales.numel // self.shape[0]
        words = torch.empty(rows * width, dtype=torch.int32)
        self._codes.read_into(words, first * width)
        codes = _unpack(words.view(rows, width), self._bits)[:, :inputs]
        scales = read_scales(self._scales, first * groups, rows * groups).view(rows, groups)
        zeros = torch.full((rows, groups), float(1 << (self._bits - 1)))
        if self._zeros is not None:
            packed = self._zeros.read()  # packed along the outputs
            zeros = _unpack(packed.mT.contiguous(), self._bits).mT[first:last].float()
        of = _groups_of(self._groups, inputs, groups)
        return (codes.float() - zeros[:, of]).mul_(scales[:, of])


class Gptq(_RowWise):
    """GPTQ: words ``[inputs * bits / 32, outputs]`` of codes, read as ``[outputs, inputs]``.

    ``value = (code - zero) * scale``, with ``scales`` ``[groups, outputs]`` and zeros packed along the outputs, which
    the first version of the format stores less ``more``. All codes are read for any piece.
    """

    __slots__ = ("_bits", "_codes", "_groups", "_more", "_scales", "_zeros")

    def __init__(
        self,
        dtype_name: str,
        *,
        bits: int,
        codes: Stored,
        scales: Stored,
        zeros: Stored,
        groups: Stored | None,
        more: int,
    ) -> None:
        shape = (codes.shape[1], codes.shape[0] * 32 // bits)
        super().__init__(dtype_name, shape, tuple(each for each in (codes, scales, zeros, groups) if each is not None))
        self._bits, self._codes, self._scales, self._zeros, self._groups = bits, codes, scales, zeros, groups
        self._more = more

    @property
    def scratch(self) -> int:
        return sum(each.nbytes for each in self._made_of)

    def _rows(self, first: int, last: int) -> Tensor:
        words = self._codes.read()[:, first:last].mT.contiguous()
        codes = _unpack(words, self._bits).float()
        zeros = _unpack(self._zeros.read(), self._bits)[:, first:last].float() + self._more
        scales = self._scales.read()[:, first:last].float()
        of = _groups_of(self._groups, self.shape[1], len(scales))
        return codes.sub_(zeros[of].mT).mul_(scales[of].mT)


class Awq(_RowWise):
    """AWQ for matrix products: words ``[inputs, outputs / 8]`` of codes of four bits, read as ``[outputs, inputs]``.

    ``value = (code - zero) * scale``, with ``scales`` ``[groups, outputs]`` and zeros packed like the codes. All codes
    are read for any piece.
    """

    __slots__ = ("_codes", "_scales", "_zeros")

    def __init__(self, dtype_name: str, *, codes: Stored, scales: Stored, zeros: Stored) -> None:
        super().__init__(dtype_name, (codes.shape[1] * 8, codes.shape[0]), (codes, scales, zeros))
        self._codes, self._scales, self._zeros = codes, scales, zeros

    @property
    def scratch(self) -> int:
        return sum(each.nbytes for each in self._made_of)

    def _rows(self, first: int, last: int) -> Tensor:
        begin, end = first // 8, -(-last // 8)
        some = slice(first - begin * 8, last - begin * 8)
        codes = _in_order(self._codes.read()[:, begin:end])[:, some].float()
        zeros = _in_order(self._zeros.read()[:, begin:end])[:, some].float()
        scales = self._scales.read()[:, first:last].float()
        of = _groups_of(None, self.shape[1], len(scales))
        return codes.sub_(zeros[of]).mul_(scales[of]).mT


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return words ``[rows, n]`` as codes ``[rows, n * 32 / bits]``, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.view(words.shape[0], -1)


def _in_order(words: Tensor) -> Tensor:
    """Return words of AWQ as codes in the order of the outputs."""
    codes = _unpack(words.contiguous(), 4)
    return codes.view(len(codes), -1, 8)[:, :, list(_AWQ_ORDER)].reshape(len(codes), -1)


def _groups_of(stored: Stored | None, inputs: int, groups: int) -> Tensor:
    """Return the group of each input: as it is stored, else groups of one size one after the other.

    Raises :class:`~merging.errors.FormatError` for groups that have no scales.
    """
    if stored is not None:
        of = stored.read().long()
        low, high = (int(each) for each in torch.aminmax(of))
        if low >= 0 and high < groups:
            return of
        if high >= 0:  # else it was never filled in
            raise FormatError(
                f"{stored.order()[0]}: damaged: an input of a quantised weight is of the group "
                f"{low if low < 0 else high}, and there are scales of {groups}: download it again"
            )
    return torch.arange(inputs) // (inputs // groups)
