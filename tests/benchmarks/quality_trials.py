"""Searches of one parameter on the validation texts of quality.py, and differences with paired errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from quality_entries import Entry
from quality_models import Judge, Models, Right

__all__ = ["Trial", "normalised", "paired"]

EXTRA = 6  # further points when the best one is at the edge of its grid


def normalised(right: Right, alone: Right) -> float:
    """Accuracy over that of each task's own model, averaged over the tasks."""
    return 100 * statistics.fmean(right[name].mean().item() / alone[name].mean().item() for name in alone)


def best(points: Mapping[float, float]) -> float:
    """The value with the highest score, the smallest of several."""
    return max(sorted(points), key=lambda value: points[value])


def searched(entry: Entry, score: Callable[[float], float]) -> dict[float, float]:
    """Scores of the grid, which is continued while its best value is its first or its last: by its steps, or by halves
    where a step down would leave nothing."""
    points = {value: score(value) for value in entry.values}
    step = entry.values[1] - entry.values[0]
    for _ in range(EXTRA):
        chosen = best(points)
        lower = chosen - step if chosen > 1.5 * step else chosen / 2
        beyond = round(chosen + step if chosen == max(points) else lower, 6)
        if min(points) < chosen < max(points) or beyond >= entry.below:
            break
        points[beyond] = score(beyond)
    return dict(sorted(points.items()))


def paired(mine: Right, other: Right) -> tuple[float, float]:
    """Difference of two accuracies averaged over tasks, and its standard error over the same texts."""
    gaps = [100 * (mine[name] - other[name]) for name in mine]
    variance = sum(gap.var().item() / len(gap) for gap in gaps)
    return statistics.fmean(gap.mean().item() for gap in gaps), variance**0.5 / len(gaps)


class Trial:
    """One entry on its way: its answers, its value and score on the validation texts, and the seconds of its merges."""

    def __init__(self, entry: Entry, models: Models, judge: Judge, own: Right) -> None:
        self.entry, self._models, self._judge = entry, models, judge
        self._seconds: list[float] = []
        if entry.search:
            points = searched(entry, lambda value: normalised(self.right(value, "valid"), own))
            self.value: float | None = best(points)
            self.points, self.score = points, points[self.value]
        else:
            self.value, self.points = None, {}
            self.score = normalised(self.right(None, "valid"), own)

    def right(self, value: float | None, split: str) -> Right:
        """What the merge at a value answers rightly, averaged over the orders."""
        answers = [self._judge.right(merged, split) for merged in self._models.merges(self.entry, value, self._seconds)]
        return {name: torch.stack([each[name] for each in answers]).mean(0) for name in answers[0]}

    def told(self) -> dict[str, Any]:
        """What a row says about the search."""
        found = {"value": self.value, "validation": self.points or None, "score": self.score}
        return {**found, "seconds": statistics.median(self._seconds)}
