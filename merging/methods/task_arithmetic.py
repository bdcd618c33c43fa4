"""Task arithmetic: add up what the models changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from merging.maths.coefficients import number
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
    concatenated and the rank is the sum of the ranks. Full checkpoints need the base. Costs one pass over the bytes.
    """

    name: ClassVar[str] = "task_arithmetic"
    summary: ClassVar[str] = "weighted sum of what each model changed"
    paper: ClassVar[str] = "Editing Models with Task Arithmetic, Ilharco et al. 2023, arXiv 2212.04089"

    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; may be negative")
    scale: Local[Coefficient] = Field(1.0, description="what the sum is multiplied by (0.3 suits eight tasks)")

    @property
    def factored(self) -> bool:
        return True

    def multiple(self, models: int) -> float | None:
        return None if varies(self.scale) else number(self.scale)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        return stack.weighted_sum([weight * self.scale for weight in self.coefficients(len(stack))])

    def update_rule(self) -> UpdateRule:
        return scaled_state("sum", TaskArithmetic(), lambda history: number(self.scale))


def scaled_state(name: str, update: Method, scale: Callable[[History], float]) -> UpdateRule:
    """Return the rule of a method whose merge is a multiple of a state with one part."""
    return UpdateRule({name: update}, scale, lambda history: TaskArithmetic(scale=scale(history)))
