"""Consensus merging: the sum of all changes, at parameters that several models need."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from merging.errors import OptionError
from merging.maths.coefficients import column
from merging.maths.delta import Delta, Dense, Stack, sum_in_order
from merging.maths.kernels.combine_steps import keep_agreed
from merging.maths.lazy_torch import Tensor
from merging.maths.parameters import Coefficient, Local, PerModel, varies
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistics

__all__ = ["Consensus", "masks"]


class Consensus(Method):
    """tau = sum_i w_i tau_i, kept where at least `agree` models need it, and 0 elsewhere.

    Model i needs an entry if |tau_i| >= threshold * |tau - tau_i| there (TALL masks, equation 3 of the paper, tau_i
    weighted): its own change stands out against the sum of the others. Entries that one model needs alone are selfish,
    and entries that no model needs are catastrophic; both are dropped. Meant for many models (`agree` is 2 for 8 to 20
    tasks). As a sum, it needs a scale of about 0.3 for 8 models. On adapters the merged change has full rank. Costs one
    pass over the bytes.
    """

    name: ClassVar[str] = "consensus"
    summary: ClassVar[str] = "sum of the changes, where several models need it"
    paper: ClassVar[str] = "Consensus Merging, Wang et al. 2024, arXiv 2405.07813"
    workspace: ClassVar[int] = 9

    threshold: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(
        0.4, description="share of the others' change that a model's own must reach (0.2 to 0.6)"
    )
    agree: Local[Annotated[int, Field(ge=1)]] = Field(2, description="how many models must need an entry")
    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; may be negative")
    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")

    def check(self, models: int) -> None:
        super().check(models)
        if not varies(self.agree) and self.agree > models:
            raise OptionError(f"consensus.agree = {self.agree}, and only {models} models were given: lower it")

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        kept = keep_agreed(
            stack,
            weights=self.coefficients(len(stack)),
            threshold=self.threshold,
            agree=self.agree,
            scale=self.scale,
        )
        if kept is not None:
            return Dense(kept)
        values = stack.dense()
        values = values * column(self.weights, values)
        total = sum_in_order(values)
        agreed = masks(values, total, self.threshold).sum(0) >= self.agree
        return Dense(total * agreed * self.scale)


def masks(values: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Return the mask ``[n, *shape]`` of entries that each model needs, from the changes and their sum."""
    return values.abs() >= threshold * (total - values).abs()
