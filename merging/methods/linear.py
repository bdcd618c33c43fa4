"""Linear merging: the weighted mean of the models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from merging.errors import OptionError, option
from merging.maths.coefficients import cancel_out, mean_weights, number
from merging.maths.delta import Delta, Stack
from merging.maths.parameters import Coefficient, Local, PerModel
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistics
from merging.methods.contract.update_rule import UpdateRule
from merging.methods.task_arithmetic import TaskArithmetic, scaled_state

__all__ = ["Linear"]


class Linear(Method):
    """theta = sum_i w_i theta_i / sum_i w_i.

    It needs no base. On adapters it acts on their changes, the products of their factors: the factors are concatenated,
    never averaged, so that the result is exact (its rank is the sum of the ranks). It is the simplest merge, and hard
    to beat for models that were fine-tuned alike. With `normalize` off it is a plain weighted sum, which for full
    checkpoints rarely makes sense unless the weights sum to 1. Costs one pass over the bytes.
    """

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "weighted mean of the models"
    paper: ClassVar[str] = "Model Soups, Wortsman et al. 2022, arXiv 2203.05482"

    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each")
    normalize: Local[bool] = Field(True, description="divide by the sum of the weights")

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        return "weights"

    @property
    def factored(self) -> bool:
        return True

    def check(self, models: int) -> None:
        super().check(models)
        if self.varies or not self.normalize:
            return
        if cancel_out(self.coefficients(models)):
            raise OptionError(
                f"the weights of linear sum to zero, so there is no mean: change them, or use "
                f"{option('normalize', False)}"
            )

    def multiple(self, models: int) -> float | None:
        if not self.normalize:
            return 1.0
        return None if self.varies else 1 / sum(map(number, self.coefficients(models)))

    def update_rule(self) -> UpdateRule:
        if not self.normalize:
            raise OptionError(
                "a store's linear is the mean of its models (normalize): for a sum of changes, task_arithmetic"
            )
        return scaled_state("sum", TaskArithmetic(), lambda history: 1 / max(1, history.models))

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        weights = self.coefficients(len(stack))
        return stack.weighted_sum(mean_weights(weights) if self.normalize else weights)
