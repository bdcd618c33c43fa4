"""The choice of checkpoints by scores: one after the other as long as they help, or the best window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merging.errors import OptionError, option
from merging.soups.snapshots import Snapshot

__all__ = ["ChosenSoup", "find_best_window", "stir_greedily"]

Evaluate = Callable[[Sequence[Sequence[Snapshot]]], Sequence[float]]
"""Returns the scores of soups, each of some checkpoints."""


@dataclass(frozen=True, slots=True)
class ChosenSoup:
    """The checkpoints that a search chose, and the score of their soup."""

    snapshots: tuple[Snapshot, ...]
    score: float


def stir_greedily(snapshots: Sequence[Snapshot], evaluate: Evaluate, minimize: bool = False) -> ChosenSoup:
    """Return the greedy soup (arXiv 2203.05482): from the best checkpoint on, each joins unless the score gets worse.

    ``minimize``: whether lower scores are better. Equal scores are tried in the order of the checkpoints, the last
    first.
    """
    sign = -1.0 if minimize else 1.0
    scored = [(sign * score, place) for place, score in enumerate(evaluate([[each] for each in snapshots]))]
    order = [place for _, place in sorted(scored, reverse=True)]
    best, chosen = max(scored)[0], order[:1]
    for place in order[1:]:
        tried = sorted([*chosen, place])
        score = sign * evaluate([[snapshots[each] for each in tried]])[0]
        if score >= best:
            best, chosen = score, tried
    return ChosenSoup(tuple(snapshots[each] for each in chosen), sign * best)


def find_best_window(
    snapshots: Sequence[Snapshot], size: int, evaluate: Evaluate, minimize: bool = False
) -> ChosenSoup:
    """Return the window of ``size`` consecutive checkpoints whose soup has the best score, the last of equal ones.

    Raises :class:`~merging.errors.OptionError` for a window of one checkpoint, or of more than there are.
    """
    if not 2 <= size <= len(snapshots):
        raise OptionError(
            f"{option('window', size)}: should be from 2 to the {len(snapshots)} checkpoints that there are"
        )
    sign = -1.0 if minimize else 1.0
    windows = [tuple(snapshots[start : start + size]) for start in range(len(snapshots) - size + 1)]
    score, place = max((sign * score, place) for place, score in enumerate(evaluate(windows)))
    return ChosenSoup(windows[place], sign * score)
