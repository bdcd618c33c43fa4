"""Paired bootstrap: the mean difference of two models on the same examples, with its confidence interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from merging.maths.lazy_torch import Tensor, torch
from merging.recycling.seeds import generator

__all__ = ["LEVEL", "Gap", "Metric", "paired_bootstrap"]

Metric = Literal["accuracy", "loss"]
"""The measure by which models are compared."""

LEVEL = 0.95
"""The confidence level of an interval."""

_AT_ONCE = 1 << 22
"""Resampled values that are held in memory at a time."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A mean difference with its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        """Whether the gain is beyond chance: the whole interval is above zero."""
        return self.low > 0

    def text(self, metric: Metric) -> str:
        """Return the difference as text, in points of accuracy or in units of the loss."""
        times, digits = (100, 1) if metric == "accuracy" else (1, 3)
        mean, low, high = (f"{times * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"

    shown = text  # its name in version 0.1


def paired_bootstrap(mine: Tensor, other: Tensor, resamples: int, seed: int) -> Gap:
    """Return the mean of ``mine - other`` and its percentile bootstrap interval.

    See Efron and Tibshirani 1993, chapter 13.

    Args:
        mine: Values of one model, ``[examples]``.
        other: Values of the other model on the same examples, ``[examples]``.
        resamples: The number of resamples. Each draws the same examples, with replacement, for both models.
        seed: The seed. It gives the same resamples for any two models.
    """
    difference = (mine - other).double()
    count = len(difference)
    random = generator(seed, "bootstrap", count)
    means: list[Tensor] = []
    done = 0
    while done < resamples:
        some = min(resamples - done, max(1, _AT_ONCE // count))
        means.append(difference[torch.randint(count, (some, count), generator=random)].mean(1))
        done += some
    bounds = torch.quantile(torch.cat(means), torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return Gap(float(difference.mean()), float(bounds[0]), float(bounds[1]))
