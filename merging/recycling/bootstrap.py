"""Differences between two models on the same examples, with an interval that tells chance from gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merging.recycling.seeds import generator

__all__ = ["LEVEL", "Gap", "Metric", "paired"]

Metric = Literal["accuracy", "loss"]
"""What models are compared by."""

LEVEL = 0.95
"""The share of resamples that an interval holds."""

_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Gap:
    """A mean difference, and the interval of it."""

    mean: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        """Whether it is a gain beyond chance: the whole interval is above zero."""
        return self.low > 0

    def shown(self, metric: Metric) -> str:
        """As people read it, in points of accuracy or in units of the loss."""
        times, digits = (100, 1) if metric == "accuracy" else (1, 3)
        mean, low, high = (f"{times * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"


def paired(mine: Tensor, other: Tensor, resamples: int, seed: int) -> Gap:
    """The mean of ``mine - other`` (``[examples]``, of the same examples) and its percentile bootstrap interval.

    Examples are resampled with replacement, the two models always on the same ones (Efron and Tibshirani 1993, chapter
    13). The same seed gives the same resamples for any two models.
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
