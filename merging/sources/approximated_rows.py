"""Rows of tokens that a model lacks, computed from rows of tokens that it shares with a donor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

from merging.maths.lazy_torch import Tensor, torch
from merging.maths.sparse_approximation import SparseSums, interpolate_neighbors, pursue_matches
from merging.sources.derived import Derived
from merging.sources.gathered_rows import read_rows, row_width
from merging.sources.stored import Stored

__all__ = ["ApproximatedRows", "Approximation", "LackingTokens"]

Approximation = Literal["omp", "common_interpolation", "subword", "mean", "zero"]
"""The ways to approximate the row of a token that a model lacks."""

_BATCH, _BLOCK, _KEPT = 64, 1 << 22, 1 << 26
"""Tokens that are approximated at a time, and elements of the dictionary that are read at a time, and kept."""


@dataclass(slots=True, eq=False)
class LackingTokens:
    """Tokens that a model lacks, and the tokens that it shares with the donor.

    Attributes:
        rows: The rows of the lacking tokens in the donor.
        shared: The rows of the shared tokens in the donor, and in the model.
        own: All rows of the model's own tokens.
        pieces: The model's rows of the pieces of each lacking token.
        method: The way to approximate.
        k: The number of shared tokens that make up a row.
        device: The device that computes.
    """

    rows: tuple[int, ...]
    shared: tuple[tuple[int, int], ...]
    own: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    method: Approximation
    k: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class ApproximatedRows(Derived):
    """The rows of a table for tokens that its model lacks, each computed when it is read.

    Attributes:
        errors: The relative error of each row in the donor's table, once it is computed; NaN before.
    """

    __slots__ = ("_donor", "_lacking", "_lock", "_mean", "_shared", "_table", "_width", "errors")

    def __init__(self, table: Stored, donor: Stored | None, lacking: LackingTokens) -> None:
        rows, width = len(lacking.rows), row_width(table)
        super().__init__(table.dtype_name, (rows, width), (table, *((donor,) if donor is not None else ())))
        self._table, self._donor, self._lacking, self._width = table, donor, lacking, width
        self._lock = Lock()
        self._shared: _StoredDictionary | None = None
        self._mean: Tensor | None = None
        self.errors = [float("nan")] * rows

    @property
    def scratch(self) -> int:
        donor = row_width(self._donor) if self._donor is not None else 0
        return 8 * _BATCH * min(self._lacking.k, donor) * (donor + self._width) + 8 * _BLOCK + 4 * _KEPT

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        width, stop = self._width, start + len(buffer)
        for first in range(start // width, -(-stop // width), _BATCH):
            last = min(first + _BATCH, -(-stop // width))
            values = self._compute(first, last).reshape(-1)
            begin, end = max(start, first * width), min(stop, last * width)
            buffer[begin - start : end - start].copy_(values[begin - first * width : end - first * width])

    def _compute(self, first: int, last: int) -> Tensor:
        """Return the rows of a range of lacking tokens, in float64."""
        lacking, donor = self._lacking, self._donor
        if lacking.method == "zero":
            return torch.zeros(last - first, self._width, dtype=torch.float64)
        if lacking.method == "subword":
            means = [self._average(pieces) for pieces in lacking.pieces[first:last]]
            return torch.stack(means)
        if lacking.method == "mean" or donor is None or not lacking.shared:
            return self._mean_row().expand(last - first, -1)
        vectors = read_rows(donor, lacking.rows[first:last]).to(lacking.device)
        shared = self._dictionary(donor)
        approximate = pursue_matches if lacking.method == "omp" else interpolate_neighbors
        sums: SparseSums = approximate(vectors, shared, min(lacking.k, len(lacking.shared)))
        self.errors[first:last] = sums.errors.tolist()
        own = [lacking.shared[number][1] for number in sums.numbers.reshape(-1).tolist()]
        rows = read_rows(self._table, own).view(*sums.numbers.shape, -1)
        return torch.einsum("nk,nkw->nw", sums.weights.cpu(), rows)

    def _average(self, pieces: Sequence[int]) -> Tensor:
        return read_rows(self._table, pieces).mean(0) if pieces else self._mean_row()

    def _mean_row(self) -> Tensor:
        """Return the mean of the rows of all tokens of the model."""
        with self._lock:
            if self._mean is None:
                total = torch.zeros(self._width, dtype=torch.float64)
                step = max(1, _BLOCK // self._width)
                for first in range(0, len(self._lacking.own), step):
                    total += read_rows(self._table, self._lacking.own[first : first + step]).sum(0)
                self._mean = total.div_(max(1, len(self._lacking.own)))
            return self._mean

    def _dictionary(self, donor: Stored) -> _StoredDictionary:
        with self._lock:
            if self._shared is None or self._shared.device != self._lacking.device:
                rows = [row for row, _ in self._lacking.shared]
                self._shared = _StoredDictionary(donor, rows, self._lacking.device)
            return self._shared


class _StoredDictionary:
    """Rows of a stored table; a small dictionary is kept in memory, on a GPU any."""

    def __init__(self, table: Stored, rows: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._table, self._rows = table, rows
        self._step = max(1, _BLOCK // row_width(table))
        small = len(rows) * row_width(table) <= _KEPT or device.type != "cpu"
        self._kept = torch.cat([block for _, block in self._read()]) if small else None

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield all vectors in blocks, each with the number of its first vector."""
        if self._kept is None:
            yield from self._read()
            return
        for first in range(0, len(self._rows), self._step):
            yield first, self._kept[first : first + self._step]

    def _read(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self._rows), self._step):
            yield first, read_rows(self._table, self._rows[first : first + self._step]).float().to(self.device)

    def select(self, numbers: Tensor) -> Tensor:
        """Return the vectors of these numbers, in float64."""
        if self._kept is not None:
            return self._kept[numbers].double()
        return read_rows(self._table, [self._rows[number] for number in numbers.tolist()]).to(self.device)
