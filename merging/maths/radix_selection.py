"""Exact order statistics of whole models, found by radix selection in a few sweeps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from math import isqrt
from typing import Any

from merging.maths import order_statistics
from merging.maths.kernels.switch import usable
from merging.maths.key_ranges import KeyRange, KeyTally
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.order_statistics import Rank
from merging.maths.reductions import Accumulator, Reduction, State, check_count, column_pieces, model_rows
from merging.maths.stored_values import StoredValues

__all__ = ["OrderStatistics"]

_INFINITY = 0x7F800000
"""The key of a float32 infinity."""

_DIGIT = 16
"""Bits counted in one sweep, as long as nothing is known of the values."""


@dataclass(frozen=True, slots=True)
class OrderStatistics(Reduction):
    """Exact order statistics: ``[n, len(ranks)]`` float64, NaN for models without elements; no tile gives ``[0, k]``.

    Radix selection: floats become integers of the same order, their keys. The first sweep counts the highest 16 bits of
    them, and the next ones look into the bin that holds the rank. That takes two sweeps for float32, to which half
    precision is widened, and up to four for float64, which ``dtype`` must state: wider values raise TypeError. After a
    sample the first sweep looks into the narrow range where the rank is expected, and mostly finds it there. A sweep
    takes at most 2.5 MiB a model and distinct range.

    With ``magnitudes`` absolute values are ranked, which is faster than to feed them. With ``positive`` only values
    above 0 are ranked, and the result is NaN where there are none. -0.0 counts as 0.0; NaN raises ValueError, and so do
    values that changed between two sweeps.
    """

    ranks: tuple[Rank, ...]
    dtype: torch.dtype | None = None
    magnitudes: bool = False
    positive: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            order_statistics.key_dtype(self.dtype)

    @property
    def sweeps(self) -> int:
        return (32 if self.dtype is None else self.dtype.itemsize * 8) // _DIGIT

    @property
    def ranked_dtype(self) -> torch.dtype:
        """The dtype in which values are ranked."""
        return torch.float32 if self.dtype is None else self.dtype

    def start(self) -> Accumulator:
        return _Selection(self)

    def widen(self, dtype: torch.dtype) -> OrderStatistics:
        return replace(self, dtype=torch.promote_types(self.ranked_dtype, dtype))


@dataclass(slots=True)
class _Search:
    """The search for one rank of one model: in a range of keys, at a position among all keys, until it has the key."""

    rank: Rank
    range: KeyRange
    place: int | None = None
    key: int | None = None


@dataclass(slots=True)
class _Model:
    """The searches of one model, and its keys in the ranges that these look into.

    Attributes:
        excluded: the number of keys that take no part.
    """

    searches: list[_Search]
    tallies: dict[KeyRange, KeyTally] = field(default_factory=dict)
    excluded: int = 0

    def begin_sweep(self) -> None:
        """Forget the keys of the last sweep."""
        ranges = (each.range for each in self.searches if each.key is None)
        self.tallies, self.excluded = {each: KeyTally(each) for each in ranges}, 0


class _Selection(Accumulator):
    """The state of the searches for all ranks of all models."""

    def __init__(self, reduction: OrderStatistics) -> None:
        self.reduction = reduction
        bits = reduction.ranked_dtype.itemsize * 8
        lowest = 0 if reduction.magnitudes else -1 << (bits - 1)
        self.everything = KeyRange(lowest, 1 << (bits - 1), bits - _DIGIT, 0, whole=True)
        self.sampling = False
        self.sweep = 0
        self.models: list[_Model] = []
        self.count = 0
        """Elements received of each model, in the current sweep."""
        self.total = 0
        """Elements of each model; 0 until the first sweep over all of them has ended."""

    def begin_sample(self) -> bool:
        self.sampling = True
        return True

    def add(self, values: Tensor | StoredValues, key: object) -> None:
        if isinstance(values, StoredValues):
            if self.reduction.ranked_dtype == torch.float32 and usable(values.values, values.base):
                self._add_stored(values, key)
                return
            values = values.decode()
        rows = model_rows(values)
        if rows.dtype == torch.float32 == self.reduction.ranked_dtype and usable(rows):
            self._add_stored(StoredValues(rows, None, tuple(rows.shape[1:]), lambda: rows), key)
            return
        if torch.promote_types(rows.dtype, self.reduction.ranked_dtype) != self.reduction.ranked_dtype:
            raise TypeError(f"{key}: {rows.dtype} values are wider than the {self.reduction.ranked_dtype} to be ranked")
        self._admit(len(rows))
        self.count += rows.shape[1]
        for piece in column_pieces(rows, 1 << 18):
            keys = order_statistics.keys(piece.to(self.reduction.ranked_dtype), self.reduction.magnitudes)
            if not self.total and order_statistics.has_nan(keys):
                raise ValueError(f"{key} holds NaN, which has no rank")
            for own, model in zip(keys, self.models, strict=True):
                if self.reduction.positive and not self.total:
                    model.excluded += int(torch.count_nonzero(own <= 0))
                for tally in model.tallies.values():
                    tally.add(own)

    def _add_stored(self, stored: StoredValues, key: object) -> None:
        """Take in changes as they are stored, by kernels where these run."""
        self._admit(len(stored.values))
        self.count += stored.values.shape[1]
        for model, own in zip(self.models, stored.values, strict=True):
            for number, tally in enumerate(model.tallies.values()):
                found = tally.add_stored(own, stored.base, self.reduction.magnitudes)
                if not self.total and found.greatest > _INFINITY:
                    raise ValueError(f"{key} holds NaN, which has no rank")
                if self.reduction.positive and not self.total and not number:
                    model.excluded += found.nonpositive

    def _admit(self, models: int) -> None:
        check_count(len(self.models) or models, models)
        for _ in range(models - len(self.models)):
            model = _Model([_Search(rank, self.everything) for rank in self.reduction.ranks])
            model.begin_sweep()
            self.models.append(model)

    def fork(self) -> _Selection:
        other = _Selection(self.reduction)
        other.sampling, other.sweep, other.total = self.sampling, self.sweep, self.total
        for mine in self.models:
            model = _Model([replace(search) for search in mine.searches])
            model.begin_sweep()
            other.models.append(model)
        return other

    def merge(self, other: _Selection) -> None:
        if (other.reduction, other.sampling, other.sweep) != (self.reduction, self.sampling, self.sweep):
            raise ValueError("only states of the same reduction and the same sweep can be merged")
        if not other.models:
            return
        self._admit(len(other.models))
        self.count += other.count
        for mine, theirs in zip(self.models, other.models, strict=True):
            mine.excluded += theirs.excluded
            for each, tally in theirs.tallies.items():
                mine.tallies[each].merge(tally)

    def next(self) -> bool:
        if not self.count:
            more, self.sampling = self.sampling, False
            return more
        if self.total and self.count != self.total:
            raise ValueError("the values changed between two sweeps")
        for model in self.models:
            for search in model.searches:
                if search.key is None:
                    self._advance(search, model)
            model.begin_sweep()
        self.total = 0 if self.sampling else self.count
        self.sampling, self.sweep, self.count = False, self.sweep + 1, 0
        return any(model.tallies for model in self.models)

    def _advance(self, search: _Search, model: _Model) -> None:
        """Narrow the range of a search by what was gathered of a model in this sweep."""
        tally = model.tallies[search.range]
        if not self.total:
            taking_part = self.count - model.excluded
            search.place = model.excluded + search.rank.index(taking_part) if taking_part else None
        if search.place is None:
            if not self.sampling:
                search.key = self.everything.low
        elif self.sampling:
            search.range = tally.expect(search.place, self.count // 512 + 2 * isqrt(self.count))
        else:
            found = tally.narrow(search.place, self.everything)
            search.key, search.range = (found, search.range) if isinstance(found, int) else (None, found)

    def state(self) -> State:
        plain: list[Any] = [self.sampling, self.sweep, self.count, self.total]
        tensors: list[Tensor] = []
        for model in self.models:
            states = [tally.state() for tally in model.tallies.values()]
            searches = [[each.range, each.place, each.key] for each in model.searches]
            plain.append([model.excluded, searches, [[each.plain, len(each.tensors)] for each in states]])
            tensors += [tensor for each in states for tensor in each.tensors]
        return State(plain, tensors)

    def restore(self, state: State) -> None:
        tensors = iter(state.tensors)
        self.sampling, self.sweep, self.count, self.total, *models = state.plain
        self.models = []
        for excluded, searches, tallies in models:
            found = [
                _Search(rank, KeyRange(*range_), place, key)
                for rank, (range_, place, key) in zip(self.reduction.ranks, searches, strict=True)
            ]
            model = _Model(found)
            model.begin_sweep()
            model.excluded = excluded
            for tally, (plain, count) in zip(model.tallies.values(), tallies, strict=True):
                tally.restore(State(plain, list(islice(tensors, count))))
            self.models.append(model)

    def result(self) -> Tensor:
        dtype = order_statistics.key_dtype(self.reduction.ranked_dtype)
        rows = []
        for model in self.models:
            keys = torch.tensor([each.key or 0 for each in model.searches], dtype=dtype)
            found = order_statistics.floats(keys).double()
            rows.append(found.masked_fill(torch.tensor([each.place is None for each in model.searches]), torch.nan))
        return torch.stack(rows) if rows else torch.empty(0, len(self.reduction.ranks), dtype=torch.float64)
