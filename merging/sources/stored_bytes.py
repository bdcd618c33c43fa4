"""The bytes of a stored tensor, of any dtype."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.dtypes import DTYPES
from merging.sources.stored import Stored

__all__ = ["StoredBytes"]

_NOT_FINITE = {"F8_E4M3": (0x7F, 0x7F), "F8_E5M2": (0x7C, 0x7C), "F8_E8M0": (0xFF, 0xFF)}
"""Bits that are all set in codes of one byte that stand for no finite number: a mask, and the value behind it."""


class StoredBytes(Derived):
    """A stored tensor as its bytes, so that it can be copied whatever its dtype is.

    ``exponents`` says that its bytes are exponents of two, also if its dtype does not.
    """

    __slots__ = ("_finite_as", "of")

    def __init__(self, of: Stored, exponents: bool = False) -> None:
        super().__init__("U8", (of.nbytes,), (of,))
        self.of = of
        self._finite_as = "F8_E8M0" if exponents else of.dtype_name

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        if self.of.dtype_name == "F8_E8M0":  # a byte each, whatever torch knows of it
            self.of.read_into(buffer, start)
            return
        dtype = DTYPES[self.of.dtype_name]
        first, last = start // dtype.itemsize, -(-(start + len(buffer)) // dtype.itemsize)
        values = torch.empty(last - first, dtype=dtype)
        self.of.read_into(values, first)
        buffer.copy_(values.view(torch.uint8)[start - first * dtype.itemsize :][: len(buffer)])

    def advise(self, start: int, count: int) -> None:
        itemsize = max(1, self.nbytes // max(1, self.of.numel))
        self.of.advise(start // itemsize, -(-count // itemsize))

    def all_finite(self, data: Tensor) -> bool:
        """Return whether bytes of the tensor, whole elements, stand for finite numbers alone."""
        if self._finite_as in _NOT_FINITE:
            mask, value = _NOT_FINITE[self._finite_as]
            return not bool(((data & mask) == value).any())
        return not self.of.floating or bool(data.view(self.of.dtype).isfinite().all())
