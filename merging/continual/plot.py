"""Plots of a store over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.continual.folder import refuse_within
from merging.errors import InputError
from merging.report.charts import count_along, lines
from merging.report.drawing import Panel, check_drawing, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from merging.continual.manifest import StepRecord
    from merging.continual.view import StoreView

__all__ = ["panels", "plot"]


def plot(store: StoreView, output: str | Path, overwrite: bool = True) -> None:
    """Draw norms, kept shares, cosines and ranks over the steps of a store, as PNG, SVG or PDF by the name's ending.

    Without ``overwrite`` a file that exists is refused. Needs matplotlib, the extra ``report``. Raises
    :class:`~merging.errors.MergingError`.
    """
    check_drawing()
    steps = store.manifest().steps
    if not steps:
        raise InputError(f"{store.path}: holds no model yet: add one first")
    refuse_within(Path(output))
    models = "1 model" if len(steps) == 1 else f"{len(steps)} models"
    save(panels(steps), output, f"{store.path.name}: {models} by {store.method.chain}", overwrite)


def panels(steps: Sequence[StepRecord]) -> list[Panel]:
    """Return the panels of a store with these steps, at least one."""
    norms = {"the model's change": [step.norm for step in steps], "the store": [step.merged for step in steps]}
    kept = {"kept": [100 * step.kept for step in steps]}
    cosines = {"cosine": [step.cosine for step in steps]}
    return [
        Panel(
            "norms",
            "The Frobenius norms of the model added in each step, and of the store after it.",
            lambda axes: _draw(axes, norms, "norm"),
        ),
        Panel(
            "share of the change that is kept",
            "The part of a model's norm that was added: 100 % unless the method trims the change, or projects earlier "
            "directions out.",
            lambda axes: _draw(axes, kept, "kept (%)", (0, 105)),
        ),
        Panel(
            "cosine of the change to the store",
            "The cosine between a model's change and the store after it: 1 is the same direction, 0 a right angle: "
            "the store has little of it.",
            lambda axes: _draw(axes, cosines, "cosine", (min(0.0, *cosines["cosine"]) and -1.05, 1.05)),
        ),
        Panel(
            "rank of the store",
            'The largest rank of the factors that are held after each step; "full" where all tensors are held in full.',
            lambda axes: _draw_ranks(axes, [step.rank for step in steps]),
        ),
    ]


def _draw(
    axes: Axes, curves: Mapping[str, Sequence[float]], label: str, limits: tuple[float, float] | None = None
) -> None:
    lines(axes, curves, ("step (models added)", label))
    if limits:
        axes.set_ylim(limits)


def _draw_ranks(axes: Axes, ranks: Sequence[int]) -> None:
    """Draw the ranks. A rank of 0 is a state held in full, and drawn on a line of its own above all ranks."""
    top = max(1, round(1.2 * max(ranks)))
    _draw(axes, {"rank": [float(rank or top) for rank in ranks]}, "rank (directions)", (0, 1.08 * top))
    count_along(axes, "y")
    if 0 in ranks:
        ticks = [tick for tick in axes.get_yticks() if tick <= 0.9 * top and any(ranks)]
        axes.set_yticks([*ticks, top], [*(f"{tick:,.0f}" for tick in ticks), "full"])
        axes.set_ylim(0, 1.08 * top)
