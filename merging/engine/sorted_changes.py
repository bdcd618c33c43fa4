"""Sorted magnitudes of models' changes: order statistics at another density cost no sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from merging.maths.delta import Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.order_statistics import Rank
from merging.maths.radix_selection import OrderStatistics
from merging.methods.contract.method import Statistic, stored_changes

if TYPE_CHECKING:
    from merging.engine.model_reader import Room

__all__ = ["SortedChanges"]


@dataclass(frozen=True, slots=True)
class _Magnitudes:
    """The sorted magnitudes of a model's changes above 0, and the number of all its elements."""

    values: Tensor
    count: int

    def at(self, rank: Rank) -> float:
        """Return the magnitude at a position among all elements. The zeros come first."""
        if not self.count:
            return float("nan")
        place = rank.index(self.count) - (self.count - len(self.values))
        return 0.0 if place < 0 else float(self.values[place])


class SortedChanges:
    """The sorted magnitudes of the changes that one reader reads, kept for all merges of them."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._kept: dict[str, _Magnitudes] = {}
        self._full = False

    def select(self, statistic: Statistic, names: Iterable[str], read: Callable[[str], Stack]) -> Tensor | None:
        """Return the value of an order statistic of the whole models' changes, with the bits of its reduction.

        Args:
            statistic: the statistic.
            names: the names of all tensors.
            read: returns the changes of a tensor.

        Returns:
            The values ``[n, ranks]`` in float64; None for other statistics, for changes that hold NaN, and where there
            is no room to keep the magnitudes.
        """
        reduction = statistic.reduction
        if statistic.measure is not stored_changes or not isinstance(reduction, OrderStatistics):
            return None
        if not reduction.magnitudes or reduction.positive or self._full:
            return None
        names = list(names)
        models = read(names[0]).models if names else ()
        if not models or not self._sort(models, names, read):
            return None
        rows = [[self._kept[key].at(rank) for rank in reduction.ranks] for key in models]
        return torch.tensor(rows, dtype=torch.float64)

    def _sort(self, models: Sequence[str], names: Sequence[str], read: Callable[[str], Stack]) -> bool:
        """Sort the changes of models that are new, and return whether all are kept now."""
        new = {key: slot for slot, key in enumerate(models) if key not in self._kept}
        parts: dict[str, list[Tensor]] = {key: [] for key in new}
        count = 0
        for name in names if new else ():
            deltas = read(name).deltas
            count += prod(deltas[0].shape)
            for key, slot in new.items():
                magnitudes = deltas[slot].dense().reshape(-1).abs()
                parts[key].append(magnitudes[magnitudes != 0])
        for key, own in parts.items():
            values = torch.cat(own).sort().values
            if len(values) and bool(values[-1].isnan()):
                return False
            if not self._room.take(values.numel() * values.element_size()):
                self._full = True
                return False
            self._kept[key] = _Magnitudes(values, count)
        return True
