"""A task as methods see it, and adapters at coefficients: the input and the result of a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

from merging.maths.lazy_torch import Tensor, torch
from merging.recycling.mixture import Activation, Mixture
from merging.recycling.model import EncodedExample, Scores, TaskModel
from merging.recycling.pool_adapters import Expert
from merging.recycling.settings import Granularity, Settings

__all__ = ["Curve", "Problem", "WeightedAdapters", "simple_average", "single_adapter"]

Curve = tuple[tuple[int, float, float | None], ...]
"""Points of a training curve: step, objective, and validation loss where it was measured."""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A task: the model, the examples to tune on (``learn``) and to validate on, and the settings."""

    model: TaskModel
    learn: tuple[EncodedExample, ...]
    valid: tuple[EncodedExample, ...]
    settings: Settings

    @property
    def shots(self) -> tuple[EncodedExample, ...]:
        """Training and validation examples."""
        return self.learn + self.valid

    def mixture(self, experts: Sequence[Expert], granularity: Granularity, activation: Activation) -> Mixture:
        """Return the model with these adapters, ready to run."""
        model = self.model
        return Mixture(model.hook_points, experts, granularity, activation, dtype=model.dtype, device=model.device)


@dataclass(frozen=True, slots=True, eq=False)
class WeightedAdapters:
    """Adapters at coefficients; without adapters, the base.

    Attributes:
        experts: The adapters.
        coefficients: One number for each adapter and group, float32.
        loss: The validation loss.
        granularity: The parts of an adapter that share a coefficient.
        activation: The function that is applied to coefficients.
        curve: The training curve that led here.
    """

    experts: tuple[Expert, ...]
    coefficients: Tensor
    loss: float = inf
    granularity: Granularity = "expert"
    activation: Activation = "linear"
    curve: Curve = ()

    def scores(self, problem: Problem, items: Sequence[EncodedExample]) -> Scores:
        """Return losses and right answers on some examples."""
        if not self.experts:
            return problem.model.scores(items)
        with self.mixture(problem).at(self.coefficients):
            return problem.model.scores(items)

    def mixture(self, problem: Problem) -> Mixture:
        """Return the model with the adapters, ready to run."""
        return problem.mixture(self.experts, self.granularity, self.activation)

    def validate(self, problem: Problem) -> WeightedAdapters:
        """Return the same with its loss on the validation examples."""
        loss = self.scores(problem, problem.valid).loss
        return replace(self, loss=loss if isfinite(loss) else inf)


def single_adapter(expert: Expert | None) -> WeightedAdapters:
    """Return one adapter with coefficient 1, or the base."""
    return WeightedAdapters((expert,), torch.ones(1)) if expert else WeightedAdapters((), torch.zeros(0))


def simple_average(experts: Sequence[Expert]) -> WeightedAdapters:
    """Return the adapters with equal coefficients that sum to 1."""
    return WeightedAdapters(tuple(experts), torch.full((len(experts),), 1 / len(experts)))
