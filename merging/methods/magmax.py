"""MagMax: the change of largest magnitude of each parameter."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from merging.maths.coefficients import column, number
from merging.maths.delta import Delta, Dense, Stack
from merging.maths.kernels.combine_steps import take_largest
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Coefficient, Local, PerModel
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistics
from merging.methods.contract.update_rule import UpdateRule
from merging.methods.task_arithmetic import scaled_state

__all__ = ["MagMax", "largest"]


class MagMax(Method):
    """Take the weighted change of largest magnitude, entry by entry.

    Of two changes that differ only in sign, it takes the positive one.
    It is meant for models that were fine-tuned one after the other, each from the last. Of independent fine-tunes it
    keeps the strongest opinion on every parameter, so that many models need a scale of about 0.5. On adapters the
    merged change has full rank. Costs one pass over the bytes.
    """

    name: ClassVar[str] = "magmax"
    summary: ClassVar[str] = "of every parameter the largest change"
    paper: ClassVar[str] = "MagMax, Marczak et al. 2024, arXiv 2407.06322"
    workspace: ClassVar[int] = 4

    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; may be negative")
    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        taken = take_largest(stack, self.coefficients(len(stack)), self.scale)
        if taken is not None:
            return Dense(taken)
        values = stack.dense()
        return Dense(largest(values * column(self.weights, values)) * self.scale)

    def update_rule(self) -> UpdateRule:
        return scaled_state("largest", MagMax(), lambda history: number(self.scale))


def largest(values: Tensor) -> Tensor:
    """Return the values ``[*shape]`` of largest magnitude among ``[n, *shape]``, the positive one of two."""
    high, low = values.amax(0), values.amin(0)
    return torch.copysign(torch.maximum(high, -low), high + low)
