"""Task arithmetic: add up what the models changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from merging.errors import OptionError, option
from merging.maths.coefficients import cancel_out, mean_weights, number
from merging.maths.delta import Delta, Stack
from merging.maths.parameters import Coefficient, Local, PerModel, varies
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistics
from merging.methods.contract.update_rule import History, UpdateRule

__all__ = ["TaskArithmetic", "scaled_state"]


class TaskArithmetic(Method):
    """theta = theta_0 + scale * sum_i w_i (theta_i - theta_0).

    Forgetting is a negative weight (`--weights -1`), an analogy is `--weights 1,1,-1`. A sum of many task vectors
    overshoots: a scale of 0.3 suits about eight tasks, 1 two or three. On adapters it is exact: the factors are
    concatenated and the rank is the sum of the ranks. Full checkpoints need the base. With `normalize` the weights are
    divided by their sum; weights that are all 0 keep the base. Costs one pass over the bytes.
    """

    name: ClassVar[str] = "task_arithmetic"
    summary: ClassVar[str] = "weighted sum of what each model changed"
    paper: ClassVar[str] = "Editing Models with Task Arithmetic, Ilharco et al. 2023, arXiv 2212.04089"

    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; may be negative")
    scale: Local[Coefficient] = Field(1.0, description="what the sum is multiplied by (0.3 suits eight tasks)")
    normalize: Local[bool] = Field(False, description="divide by the sum of the weights")

    @property
    def factored(self) -> bool:
        return True

    def check(self, models: int) -> None:
        super().check(models)
        if self.varies or not self.normalize:
            return
        weights = self.coefficients(models)
        if cancel_out(weights) and any(map(number, weights)):
            raise OptionError(
                f"the weights of task_arithmetic sum to zero, so nothing can be divided by their sum: change them, or "
                f"use {option('normalize', False)}"
            )

    def multiple(self, models: int) -> float | None:
        if varies(self.scale) or varies(self.normalize) or (self.normalize and self.varies):
            return None
        total = sum(map(number, self.coefficients(models))) if self.normalize else 1.0
        return number(self.scale) / (total or 1.0)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        weights = self.coefficients(len(stack))
        if self.normalize and any(map(number, weights)):
            weights = mean_weights(weights)
        return stack.weighted_sum([weight * self.scale for weight in weights])

    def update_rule(self) -> UpdateRule:
        if self.normalize:
            raise OptionError("a store's task_arithmetic adds up: for a mean of models (normalize), use linear")
        return scaled_state("sum", TaskArithmetic(), lambda history: number(self.scale))


def scaled_state(name: str, update: Method, scale: Callable[[History], float]) -> UpdateRule:
    """Return the rule of a method whose merge is a multiple of a state with one part."""
    return UpdateRule({name: update}, scale, lambda history: TaskArithmetic(scale=scale(history)))
