"""Tensors that are multiplied by a number when they are read."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.dtypes import DTYPES
from merging.sources.stored import Stored

__all__ = ["Multiplied"]


class Multiplied(Derived):
    """A tensor times a number, rounded to its own type, or to a wider one; times 0 it is not read."""

    __slots__ = ("_factor", "_of")

    def __init__(self, of: Stored, factor: float, widest: str | None = None) -> None:
        wider = widest is not None and DTYPES[widest].itemsize > of.dtype.itemsize
        super().__init__(widest if widest is not None and wider else of.dtype_name, of.shape, (of,))
        self._of, self._factor = of, factor

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        if self._factor == 0:
            buffer.zero_()
            return
        values = buffer
        if buffer.dtype != self._of.dtype:
            values = torch.empty(len(buffer), dtype=self._of.dtype)
        self._of.read_into(values, start)
        wide = torch.float64 if buffer.dtype == torch.float64 else torch.float32
        buffer.copy_(values.to(wide) * self._factor)

    def source(self) -> str:
        return f"{self._of.source()}*{self._factor!r}"

    def advise(self, start: int, count: int) -> None:
        if self._factor:
            self._of.advise(start, count)
