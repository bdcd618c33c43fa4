"""The settings of a soup, and the recipe of some checkpoints by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.errors import OptionError, option
from merging.plan.recipe import Recipe
from merging.plan.recipe_values import make_recipe
from merging.soups.schedules import Schedule, schedule_weights
from merging.soups.scoring import ScoreFunction
from merging.soups.snapshots import Snapshot

__all__ = ["SoupSettings", "make_soup_recipe", "weigh_soup"]


@dataclass(frozen=True, kw_only=True)
class SoupSettings:
    """The checkpoints of a soup, and their weights: the parameters of :func:`merging.soup` of the same names."""

    last: int | None = None
    until: int | None = None
    schedule: Schedule = "mean"
    ema_decay: float | None = None
    score: str | ScoreFunction | None = None
    window: int | None = None
    minimize: bool = False
    score_timeout: float = 3600.0

    def __post_init__(self) -> None:
        if self.score is None and (self.window is not None or self.minimize):
            name = option("window", self.window) if self.window is not None else option("minimize", True)
            raise OptionError(
                f"{name}: is for soups that are scored: add {option('score', 'COMMAND')}, or choose a window by "
                f"{option('last', 'COUNT')} and {option('until', 'STEP')}"
            )
        if self.score is not None and self.window is None and self.schedule != "mean":
            raise OptionError(
                f"{option('schedule', self.schedule)}: a greedy soup is a mean: add {option('window', 'COUNT')} to "
                f"score windows with this schedule"
            )


def make_soup_recipe(snapshots: Sequence[Snapshot], settings: SoupSettings, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe that merges checkpoints into a soup."""
    weights = weigh_soup(snapshots, settings)
    parameters = {} if len(set(weights)) == 1 else {"weights": weights}
    models = [each.path for each in snapshots]
    return make_recipe({"models": models, "method": "linear", "parameters": parameters, **options}, "soup")


def weigh_soup(snapshots: Sequence[Snapshot], settings: SoupSettings) -> list[float]:
    """Return the weights of checkpoints by the schedule."""
    return schedule_weights([each.step for each in snapshots], settings.schedule, settings.ema_decay)
