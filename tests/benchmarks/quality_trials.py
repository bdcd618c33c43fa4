"""Searches of one parameter on validation examples, differences with paired errors, and their tables.

What quality.py, vision.py and llm.py share.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from kept_answers import Right
from quality_entries import CHAINS, REFERENCE, Entry
from speed import table

import merging

__all__ = ["Judge", "Models", "Trial", "compare", "normalised", "paired", "show"]

EXTRA = 6  # further points when the best one is at the edge of its grid


class Models(Protocol):
    """The models of one kind, one a task, and their merges. Weights are in a form that the judge takes."""

    kind: str
    each: Sequence[Any]

    def merges(self, entry: Entry, value: float | None, seconds: list[float]) -> Iterable[Any]:
        """The merge, or one of each order where that matters; the seconds of each are added."""


class Judge(Protocol):
    """Asks models the examples of tasks."""

    tasks: Collection[str]
    asked: Collection[str]  # the names of the splits, "valid" and "test"

    def right(self, weights: Any, split: str, names: Sequence[str] = ()) -> Right:
        """Which examples (of some tasks only) are answered rightly with these weights; {} is the base."""


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


def edged(row: Mapping[str, Any]) -> str:
    """The value that was chosen; a star marks one that is still at the edge of its grid."""
    value, points = row.get("value"), row.get("validation")
    return "-" if value is None else f"{value:g}" + ("*" if points and value in (min(points), max(points)) else "")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as it is printed."""
    shown = [row["method"], edged(row), f"{row['score']:.1f}" if "score" in row else "-"]
    shown += [f"{row['accuracy']:.1f}", f"{row['normalised']:.1f}", f"{row['difference']:+.1f} ± {row['error']:.1f}"]
    return [*shown, f"{row['seconds']:.2f}" if "seconds" in row else "-"]


def compare(models: Models, entries: Sequence[Entry], judge: Judge) -> dict[str, Any]:
    """What every method reached in per cent, after the base and each task's own model; the scores of the chains on the
    validation texts; and what was chosen there, with what it reached on the test texts."""
    kind = models.kind
    each = list(zip(judge.tasks, models.each, strict=True))
    own = {s: {name: judge.right(weights, s, [name])[name] for name, weights in each} for s in judge.asked}
    rights: dict[str, Right] = {"base": judge.right({}, "test"), "individual": own["test"]}
    trials: list[Trial] = []
    for entry in entries:
        start = time.perf_counter()
        try:
            trials.append(Trial(entry, models, judge, own["valid"]))
            if entry not in CHAINS:
                rights[entry.title] = trials[-1].right(trials[-1].value, "test")
        except merging.MergingError as refusal:
            print(f"{kind} {entry.title}: refused: {refusal}", flush=True)
        print(f"{kind} {entry.title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    winner = max(trials, key=lambda trial: trial.score)
    published = max((trial for trial in trials if trial.entry not in CHAINS), key=lambda trial: trial.score)
    told = {trial.entry.title: trial.told() for trial in trials}

    def row(title: str, right: Right) -> dict[str, Any]:
        tasks = {name: 100 * each.mean().item() for name, each in right.items()}
        mean, share = statistics.fmean(tasks.values()), normalised(right, own["test"])
        difference, error = paired(right, rights[REFERENCE])
        reached = {"accuracy": mean, "normalised": share, "difference": difference, "error": error}
        return {"method": title, "tasks": tasks, **reached, **told.get(title, {})}

    title = winner.entry.title
    right = rights[title] if title in rights else winner.right(winner.value, "test")
    difference, error = paired(right, rights[published.entry.title])
    against = {"published": published.entry.title, "against published": difference, "error": error}
    return {
        "rows": [row(title, right) for title, right in rights.items()],
        "chains": [{"method": each.entry.title, **each.told()} for each in trials if each.entry in CHAINS],
        "chosen on validation": {"row": row(title, right), **against, "of": len(trials)},
    }


def verdict(chosen: Mapping[str, Any]) -> str:
    """What was chosen on validation and what the test texts say, in one line."""
    row = chosen["row"]
    shown = f"{row['method']} ({edged(row)}), the best of {chosen['of']} there with {row['score']:.1f}"
    told = f"chosen on validation: {shown}: on the test texts {row['accuracy']:.1f}"
    if row["method"] == chosen["published"]:
        return f"{told}; it is a published method itself"
    gap = f"{chosen['against published']:+.1f} ± {chosen['error']:.1f}"
    return f"{told}, against the best published method there, {chosen['published']}, {gap}"


def show(kind: str, found: Mapping[str, Any]) -> None:
    """Print the tables of a comparison: the methods, the chains, and which one validation chose."""
    rows, chains = found["rows"], found["chains"]
    heads = ["chosen", "on validation", "accuracy", "normalised", f"against {REFERENCE}", "seconds a merge"]
    print(table([f"{kind} method", *heads], [cells(row) for row in rows]), end="\n\n")
    if chains:
        shown = [[row["method"], edged(row), f"{row['score']:.1f}", f"{row['seconds']:.2f}"] for row in chains]
        print(table([f"{kind} chain", *heads[:2], heads[-1]], shown), end="\n\n")
    print(verdict(found["chosen on validation"]), flush=True)
