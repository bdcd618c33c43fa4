"""Exact order statistics of whole models, found by radix selection in a few sweeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from merging.maths import order_statistics
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.order_statistics import Rank
from merging.maths.reductions import Accumulator, Reduction, State, check_count, column_pieces, model_rows

__all__ = ["OrderStatistics"]

_DIGIT = 16
"""Bits counted in one sweep."""


@dataclass(frozen=True, slots=True)
class OrderStatistics(Reduction):
    """Exact order statistics: ``[n, len(ranks)]`` float64, NaN for models without elements; no tile gives ``[0, k]``.

    Radix selection: floats become integers of the same order. Each sweep counts 16 bits of them, and the next one looks
    into the bin that holds the rank. That takes two sweeps for float32, to which half precision is widened, and four
    for float64, which ``dtype`` must state: wider values raise TypeError. The first sweep takes half a MiB a model, the
    others half a MiB a model and distinct bin. With ``magnitudes`` absolute values are ranked, which is faster than to
    feed them. -0.0 counts as 0.0; NaN raises ValueError, and so do values that changed between two sweeps.
    """

    ranks: tuple[Rank, ...]
    dtype: torch.dtype | None = None
    magnitudes: bool = False

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


class _Selection(Accumulator):
    """Counts of the current 16 bits, in the bins that hold a rank.

    A bin is named by its lowest key. Each model has in ``bins`` the number of elements of each bin to look into, in
    ``wanted`` a pair a rank (its bin, its position there), in ``counts`` the counts of each bin, int64 [65536].
    """

    def __init__(self, reduction: OrderStatistics) -> None:
        self.reduction = reduction
        self.shift = reduction.ranked_dtype.itemsize * 8 - _DIGIT
        self.bins: list[dict[int, int]] = []
        self.wanted: list[list[tuple[int, int]]] = []
        self.counts: list[dict[int, Tensor]] = []
        self.count = 0
        """Elements received of each model, in the current sweep."""

    def add(self, values: Tensor, key: object) -> None:
        rows = model_rows(values)
        if torch.promote_types(rows.dtype, self.reduction.ranked_dtype) != self.reduction.ranked_dtype:
            raise TypeError(f"{key}: {rows.dtype} values are wider than the {self.reduction.ranked_dtype} to be ranked")
        self._admit(len(rows))
        self.count += rows.shape[1]
        for piece in column_pieces(rows, 1 << 18):
            keys = order_statistics.keys(piece.to(self.reduction.ranked_dtype), self.reduction.magnitudes)
            if not self.bins and order_statistics.has_nan(keys):
                raise ValueError(f"{key} holds NaN, which has no rank")
            self._count(keys)

    def _admit(self, models: int) -> None:
        check_count(len(self.counts) or models, models)
        if not self.counts:
            self.counts = [{} for _ in range(models)]

    def _count(self, keys: Tensor) -> None:
        """Count the current bits of the keys ``[n, elements]``."""
        ones = torch.ones(keys.shape[1], dtype=torch.int64, device=keys.device)
        for model, counts in enumerate(self.counts):
            for lowest in self._lowest(model):
                digits = self._digits(keys[model], lowest)
                if lowest not in counts:
                    counts[lowest] = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=keys.device)
                # unlike bincount, this does not pass over all 65,536 counters for every piece
                counts[lowest].scatter_add_(0, digits.long(), ones[: len(digits)])

    def _lowest(self, model: int) -> Iterable[int]:
        """Return the bins to look into; in the first sweep the bin of all keys."""
        return self.bins[model] if self.bins else (-1 << (self.shift + _DIGIT - 1),)

    def _digits(self, keys: Tensor, lowest: int) -> Tensor:
        """Return the current bits, 0 to 65535, of the keys in a bin."""
        if self.bins:
            outer = self.shift + _DIGIT
            keys = _select(keys, (keys >> outer) == (lowest >> outer))
        return (keys >> self.shift) - (lowest >> self.shift)

    def fork(self) -> _Selection:
        other = _Selection(self.reduction)
        other.shift, other.bins, other.wanted = self.shift, self.bins, self.wanted
        other.counts = [{} for _ in self.counts]
        return other

    def merge(self, other: _Selection) -> None:
        if (other.reduction, other.shift, other.bins) != (self.reduction, self.shift, self.bins):
            raise ValueError("only states of the same reduction and the same sweep can be merged")
        if not other.counts:
            return
        self._admit(len(other.counts))
        self.count += other.count
        for mine, theirs in zip(self.counts, other.counts, strict=True):
            for lowest, counts in theirs.items():
                mine[lowest] = mine[lowest] + counts.to(mine[lowest].device) if lowest in mine else counts

    def next(self) -> bool:
        if not self.count:
            return False
        if not self.bins:
            (lowest,) = self._lowest(0)
            self.bins = [{lowest: self.count}] * len(self.counts)
            self.wanted = [[(lowest, rank.index(self.count)) for rank in self.reduction.ranks]] * len(self.counts)
        narrowed = [self._narrow(*each) for each in zip(self.bins, self.wanted, self.counts, strict=True)]
        self.bins, self.wanted = [bins for bins, _ in narrowed], [wanted for _, wanted in narrowed]
        self.shift, self.count, self.counts = self.shift - _DIGIT, 0, [{} for _ in self.counts]
        return self.shift >= 0

    def _narrow(
        self, bins: dict[int, int], wanted: list[tuple[int, int]], counts: dict[int, Tensor]
    ) -> tuple[dict[int, int], list[tuple[int, int]]]:
        """Return the bins, narrower by 16 bits, that hold the ranks of one model."""
        tables = {lowest: torch.cumsum(table.cpu(), 0) for lowest, table in counts.items()}
        if {lowest: int(table[-1]) for lowest, table in tables.items()} != bins:
            raise ValueError("the values changed between two sweeps")
        inner, places = {}, []
        for lowest, place in wanted:
            digit = int(torch.searchsorted(tables[lowest], place, right=True))
            before = int(tables[lowest][digit - 1]) if digit else 0
            low = lowest + (digit << self.shift)
            inner[low] = int(tables[lowest][digit]) - before
            places.append((low, place - before))
        return inner, places

    def state(self) -> State:
        plain = {
            "shift": self.shift,
            "count": self.count,
            "bins": [[*bins.items()] for bins in self.bins],
            "wanted": self.wanted,
            "counted": [[*counts] for counts in self.counts],
        }
        return State(plain, [table.cpu() for counts in self.counts for table in counts.values()])

    def restore(self, state: State) -> None:
        plain, tables = state.plain, iter(state.tensors)
        self.shift, self.count = plain["shift"], plain["count"]
        self.bins = [dict(bins) for bins in plain["bins"]]
        self.wanted = [[(lowest, place) for lowest, place in wanted] for wanted in plain["wanted"]]
        self.counts = [{lowest: next(tables) for lowest in counted} for counted in plain["counted"]]

    def result(self) -> Tensor:
        if self.shift >= 0:  # no elements: a search that ended has used up all bits
            return torch.full((len(self.counts), len(self.reduction.ranks)), torch.nan, dtype=torch.float64)
        keys = [[lowest for lowest, _ in wanted] for wanted in self.wanted]
        dtype = order_statistics.key_dtype(self.reduction.ranked_dtype)
        return order_statistics.floats(torch.tensor(keys, dtype=dtype)).double()


def _select(values: Tensor, mask: Tensor) -> Tensor:
    """Return the few values that a mask picks; on a CPU numpy finds them several times faster."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy()[mask.numpy()])
    return torch.masked_select(values, mask)
