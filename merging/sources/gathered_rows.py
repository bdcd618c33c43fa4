"""Tables whose rows are gathered from the rows of other tables, when they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.stored import Stored

__all__ = ["GatheredRows", "RowMap", "RowSource", "read_rows", "row_width"]

RowSource = tuple[tuple[int, int], ...] | None
"""The rows whose mean a row is, each as the number of a table and a row of it; ``()`` is a row of zeros, and None the
mean of all other rows."""

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """The origin of each row of a table, in runs of rows that follow one another in their tables too.

    Attributes:
        rows: The number of rows.
        starts: The first row of each run, and ``rows`` at the end.
        sources: The source of the first row of each run.
    """

    rows: int
    starts: tuple[int, ...]
    sources: tuple[RowSource, ...]

    @classmethod
    def of(cls, sources: Iterable[RowSource]) -> RowMap:
        """Return the map of rows with these sources, in their order."""
        starts: list[int] = []
        first: list[RowSource] = []
        follows: RowSource = ()
        row = -1
        for row, source in enumerate(sources):
            if not starts or source != follows:
                starts.append(row)
                first.append(source)
            follows = source and tuple((table, place + 1) for table, place in source)
        return cls(row + 1, (*starts, row + 1), tuple(first))

    def is_identity(self, table: int, rows: int) -> bool:
        """Return whether the rows are all rows of one table, in its order."""
        return self.rows == rows and self.sources == (((table, 0),),)

    def runs(self, first: int, last: int) -> Iterable[tuple[int, int, RowSource]]:
        """Yield the runs within a range of rows: the first row, the row behind the last, and the first row's source."""
        index = bisect_right(self.starts, first) - 1
        while first < last:
            until = min(last, self.starts[index + 1])
            source, ahead = self.sources[index], first - self.starts[index]
            yield first, until, source and tuple((table, place + ahead) for table, place in source)
            first, index = until, index + 1


class GatheredRows(Derived):
    """A table with the rows of a :class:`RowMap`, in the type and shape of ``like`` but for the number of rows.

    ``tables`` are the tables by their number in the map, None for models that lack it. A mean is taken over
    the rows that exist. Rows are contiguous: only axes of size 1 come before the axis of the tokens.
    """

    __slots__ = ("_lock", "_map", "_mean", "_tables", "_width")

    def __init__(self, like: Stored, rows: RowMap, tables: Sequence[Stored | None]) -> None:
        axis = next((axis for axis, size in enumerate(like.shape) if size != 1), 0)
        shape = (*like.shape[:axis], rows.rows, *like.shape[axis + 1 :])
        others = [each for each in tables if each is not None and each is not like]
        super().__init__(like.dtype_name, shape, (like, *others))
        self._map, self._tables, self._width = rows, tables, row_width(like)
        self._lock = Lock()
        self._mean: Tensor | None = None

    @property
    def scratch(self) -> int:
        return max((each.scratch for each in self._tables if each is not None), default=0)

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        width, stop = self._width, start + len(buffer)
        for first, until, source in self._map.runs(start // width, -(-stop // width)):
            begin, end = max(first * width, start), min(until * width, stop)
            self._read_run(buffer[begin - start : end - start], source, begin - first * width)

    def _read_run(self, piece: Tensor, source: RowSource, offset: int) -> None:
        """Fill a piece with the elements of a run from ``offset`` on, counted from the run's first row."""
        if source is None:
            mean = self._mean_row().to(piece.dtype)
            places = torch.arange(offset, offset + len(piece)) % self._width
            piece.copy_(mean[places])
            return
        stored = [(table, place) for number, place in source if (table := self._tables[number]) is not None]
        if len(stored) == 1 and stored[0][0].dtype_name == self.dtype_name:
            table, place = stored[0]
            table.read_into(piece, place * self._width + offset)
            return
        total = torch.zeros(len(piece), dtype=_widest([table for table, _ in stored]))
        for table, place in stored:
            raw = torch.empty(len(piece), dtype=table.dtype)
            table.read_into(raw, place * self._width + offset)
            total += raw
        piece.copy_(total.div_(max(1, len(stored))))

    def _mean_row(self) -> Tensor:
        """Return the mean of all rows that have a source, in float64; it is computed once."""
        with self._lock:
            if self._mean is None:
                total, count = torch.zeros(self._width, dtype=torch.float64), 0
                for rows in self._blocks():
                    total += rows.double().sum(0)
                    count += len(rows)
                self._mean = total.div_(max(1, count))
            return self._mean

    def _blocks(self) -> Iterable[Tensor]:
        """Yield all rows that have a source, in blocks."""
        step = max(1, _PIECE // self._width)
        for first, until, source in self._map.runs(0, self._map.rows):
            for row in range(first, until, step) if source is not None else ():
                block = torch.empty(min(step, until - row) * self._width, dtype=self.dtype)
                shifted = source and tuple((table, place + row - first) for table, place in source)
                self._read_run(block, shifted, 0)
                yield block.view(-1, self._width)


def row_width(table: Stored) -> int:
    """Return the number of elements for each token of a table; axes of size 1 may come before the tokens."""
    return table.numel // next((size for size in table.shape if size != 1), 1)


def read_rows(table: Stored, rows: Sequence[int]) -> Tensor:
    """Return rows of a stored table, in float64; rows that follow one another are read together."""
    width = row_width(table)
    values = torch.empty(len(rows) * width, dtype=table.dtype)
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and rows[last] == rows[last - 1] + 1:
            last += 1
        table.read_into(values[first * width : last * width], rows[first] * width)
        first = last
    return values.view(len(rows), width).double()


def _widest(tables: Sequence[Stored]) -> torch.dtype:
    return torch.float64 if any(each.dtype_name == "F64" for each in tables) else torch.float32
