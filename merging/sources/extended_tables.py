"""Tables that are read with more rows than are stored, or with fewer."""

from __future__ import annotations

from collections.abc import Sequence

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.stored import Stored

__all__ = ["ExtendedTable", "MeanTable"]


class ExtendedTable(Derived):
    """A stored table without its last rows, or with rows of other tables after its own.

    A missing row is taken from ``preferred`` if it has the row, else it is the mean over all ``others`` that have the
    row. Rows follow one another, so that flat positions decide everything.
    """

    __slots__ = ("_of", "_others", "_preferred")

    def __init__(
        self, of: Stored, shape: tuple[int, ...], preferred: Stored | None, others: tuple[Stored, ...] = ()
    ) -> None:
        lent = (*((preferred,) if preferred else ()), *others)
        super().__init__(of.dtype_name, shape, (of, *lent))
        self._of, self._preferred, self._others = of, preferred, others

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        position, stop = start, start + len(buffer)
        while position < stop:
            lenders = self._lenders(position)
            until = min(stop, *(each.numel for each in lenders))
            piece = buffer[position - start : until - start]
            if lenders[0] is self._of:
                self._of.read_into(piece, position)
            else:
                piece.copy_(_mean(lenders, position, len(piece)))
            position = until

    def _lenders(self, position: int) -> list[Stored]:
        """Return the tensors from which an element is taken."""
        for each in (self._of, self._preferred):
            if each is not None and position < each.numel:
                return [each]
        return [each for each in self._others if position < each.numel]

    def advise(self, start: int, count: int) -> None:
        self._of.advise(start, min(count, max(0, self._of.numel - start)))


class MeanTable(Derived):
    """The mean of tensors of one shape."""

    __slots__ = ("_of",)

    def __init__(self, of: tuple[Stored, ...]) -> None:
        super().__init__("F64" if any(each.dtype_name == "F64" for each in of) else "F32", of[0].shape, of)
        self._of = of

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        buffer.copy_(_mean(self._of, start, len(buffer)))


def _mean(lenders: Sequence[Stored], start: int, size: int) -> Tensor:
    wide = torch.float64 if any(each.dtype_name == "F64" for each in lenders) else torch.float32
    total = torch.zeros(size, dtype=wide)
    for each in lenders:
        raw = torch.empty(size, dtype=each.dtype)
        each.read_into(raw, start)
        total += raw
    return total.div_(len(lenders))
