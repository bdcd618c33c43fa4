"""A task as methods see it, and adapters at coefficients, which are what methods find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import Tensor

from merging.recycling.experts import Expert
from merging.recycling.mixture import Activation, Mixture
from merging.recycling.model import Item, Scores, TaskModel
from merging.recycling.settings import Granularity, Settings

__all__ = ["Curve", "Mixed", "Problem", "alone", "mean"]

Curve = tuple[tuple[int, float, float | None], ...]
"""Step, what is minimised, and validation loss where it was looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A task as the methods see it: a model, what to tune on, what to validate on, and the settings."""

    model: TaskModel
    learn: tuple[Item, ...]
    valid: tuple[Item, ...]
    settings: Settings

    @property
    def shots(self) -> tuple[Item, ...]:
        """All examples that may be looked at."""
        return self.learn + self.valid

    def mixture(self, experts: Sequence[Expert], granularity: Granularity, activation: Activation) -> Mixture:
        """Adapters beside the model."""
        model = self.model
        return Mixture(model.places, experts, granularity, activation, dtype=model.dtype, device=model.device)


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """Adapters at coefficients: what is measured, and what is written. No adapters are the base.

    ``loss`` is that of validation; ``curve`` tells how it was found.
    """

    experts: tuple[Expert, ...]
    coefficients: Tensor
    loss: float = inf
    granularity: Granularity = "expert"
    activation: Activation = "linear"
    curve: Curve = ()

    def scores(self, problem: Problem, items: Sequence[Item]) -> Scores:
        """Losses and right answers on some examples."""
        if not self.experts:
            return problem.model.scores(items)
        with self.mixture(problem).at(self.coefficients):
            return problem.model.scores(items)

    def mixture(self, problem: Problem) -> Mixture:
        """The adapters beside the model."""
        return problem.mixture(self.experts, self.granularity, self.activation)

    def validated(self, problem: Problem) -> Mixed:
        """The same with its loss on the validation examples."""
        loss = self.scores(problem, problem.valid).loss
        return replace(self, loss=loss if isfinite(loss) else inf)


def alone(expert: Expert | None) -> Mixed:
    """One adapter as it is, or the base."""
    return Mixed((expert,), torch.ones(1)) if expert else Mixed((), torch.zeros(0))


def mean(experts: Sequence[Expert]) -> Mixed:
    """The simple average."""
    return Mixed(tuple(experts), torch.full((len(experts),), 1 / len(experts)))
