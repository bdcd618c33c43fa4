"""VaRM: the mean of the changes, weighted by how much each model moved the tensor."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from merging.maths.delta import Delta, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import squared_norm
from merging.maths.parameters import Coefficient, Local
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistic, Statistics
from merging.methods.sce import shares_of

__all__ = ["Varm"]

_SQUARES = "varm.squares"


class Varm(Method):
    """tau = sum_i eta_i tau_i with eta_i = |tau_i|^2 / sum_j |tau_j|^2, for each tensor.

    In variation ratio merging the model that moved a tensor farthest counts most, by the square. There is no number to
    tune, but a model that was overtrained, or scaled, takes over. On adapters it is exact: the squared norms follow
    from the factors' products, and the rank is the sum of the ranks. Costs two passes over each tensor.
    """

    name: ClassVar[str] = "varm"
    summary: ClassVar[str] = "mean of the changes, weighted by squared size"
    paper: ClassVar[str] = "FuseChat, Wan et al. 2024, arXiv 2408.07990 (its first version)"

    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")

    @property
    def factored(self) -> bool:
        return True

    def required_statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(_SQUARES, Sum(), _squares, per="tensor"),)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        return stack.weighted_sum([share * self.scale for share in shares_of(statistics[_SQUARES])])


def _squares(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
    if stack.low_rank:
        return torch.stack([squared_norm(delta) for delta in stack.deltas])[:, None]
    return stack.dense().square()
