"""DO-Merging: orthogonalize the adapters, then merge magnitudes and directions apart."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.delta import Delta, Stack
from merging.maths.parameters import Coefficient, Local
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Method, Statistics
from merging.methods.decouple import Decouple
from merging.methods.orthogonalize import Orthogonalize

__all__ = ["Do"]


class Do(Method):
    """Decoupled and orthogonal merging: scale * mean magnitude * mean direction of orthogonalized adapters.

    It is the chain `orthogonalize+decouple` around a plain mean. The factors of different adapters are moved towards
    orthogonality. The columns of each change are split into magnitude and direction; both are averaged apart, over the
    adapters that have the module, and multiplied. LoRA updates of different tasks differ in size far more than full
    fine-tunes, so that a few dominate a sum; here all count equally. It is exact on factors: the rank is the sum of the
    ranks, and no matrix is built.

    The mean of n nearly orthogonal directions has length 1/sqrt(n), so that the scale should grow with n: try 1 to n/2
    (on eight adapters about n/2 was best). It was published without code. The overlap, its penalty and the scale (mean
    times mean, 1/n^2 of sum times sum) are choices, see `orthogonalize`. Full checkpoints are decoupled but not
    orthogonalized; a bias or a norm is one column. Costs some tenths of a second for each module of a large language
    model.
    """

    name: ClassVar[str] = "do"
    summary: ClassVar[str] = "magnitudes and directions apart, adapters orthogonalized"
    paper: ClassVar[str] = "DO-Merging, Zheng et al. 2025, arXiv 2505.15875"

    steps: Local[Annotated[int, Field(ge=0, le=10_000)]] = Field(
        100, description="steps of descent that orthogonalize; 0 only decouples"
    )
    gamma: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(
        1.0, description="penalty for moving a factor; 0 is none"
    )
    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by (1 to n/2)")

    def grain_at(self, site: Site) -> Grain:
        return "matrix"

    @property
    def factored(self) -> bool:
        return True

    @property
    def expansion(self) -> Method:
        return Orthogonalize(steps=self.steps, gamma=self.gamma, then=Decouple(then=_Mean(scale=self.scale)))

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        return self.expansion.merge(stack, site, statistics)


class _Mean(Method):
    """The mean over the models that have the tensor."""

    name: ClassVar[str] = "mean"
    summary: ClassVar[str] = "mean over the models that have the tensor"

    scale: Local[Coefficient] = 1.0

    @property
    def factored(self) -> bool:
        return True

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        return stack.weighted_sum([self.scale * has / sum(stack.present) for has in stack.present])
