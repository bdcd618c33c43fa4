"""The geometric median: the point with the smallest sum of distances to all models."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.coefficients import column, number
from merging.maths.delta import Delta, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Coefficient, Local, PerModel
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistic, Statistics
from merging.methods.families.spherical import GRAM, check_mean_weights, gram, plain_weights

__all__ = ["GeometricMedian", "weiszfeld"]

_SURE = 1 - 1e-9
"""By this factor its weight must exceed the pull of the others, so that two equal models meet halfway."""

_NEAR = 1e-8
"""Models nearer to each other than this share of their size are the same: their inner products do not tell."""


class GeometricMedian(Method):
    """The tau of each tensor that minimizes sum_i w_i |tau - tau_i|: a mean that one outlier does not move far.

    A model is the median if the others do not pull it away with more than its own weight, as one with more than half of
    the weights. Else steps of Weiszfeld's algorithm start from the weighted mean: tau becomes the mean of the models
    with weights w_i / |tau - tau_i|. They end when no model's share changes by more than `tol`, at most after
    `max_iter`. Every iterate is a weighted sum of the models, so the steps need only their inner products: one pass
    over each tensor gathers them, and one adds up. On adapters it is exact.

    Fine-tunes of different tasks are at similar distances from each other, and their median is close to their mean. It
    helps where a few of many models are broken or far away.
    """

    name: ClassVar[str] = "geometric_median"
    summary: ClassVar[str] = "least sum of distances to all: outliers count little"
    paper: ClassVar[str] = "Weiszfeld 1937; robust aggregation, Pillutla et al. 2022, arXiv 1912.13445"

    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; at least 0")
    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")
    max_iter: Local[Annotated[int, Field(ge=1, le=1_000_000)]] = Field(1000, description="most steps")
    tol: Local[Annotated[float, Field(gt=0, lt=1)]] = Field(
        1e-12, description="a change of all shares below this ends the search"
    )

    def check(self, models: int) -> None:
        super().check(models)
        check_mean_weights(self, models, "median")

    @property
    def factored(self) -> bool:
        return True

    def required_statistics(self) -> tuple[Statistic, ...]:
        return (GRAM,)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        grams = gram(statistics)
        shares = weiszfeld(grams, column(self.weights, grams).view(-1), self.max_iter, self.tol)
        return stack.weighted_sum([share * self.scale for share in plain_weights(shares)])


def weiszfeld(grams: Tensor, weights: Tensor, max_iter: int, tol: float) -> Tensor:
    """Return the shares ``[n]`` of the models in their median, from their inner products ``[n, n]``."""
    total = weights.sum()
    if not total:
        return weights
    weights = weights / total
    for own in torch.eye(len(weights)).to(weights).unbind():
        near, pull = _pull(own, grams, weights)
        if number(_length(pull - pull.sum() * own, grams)) < _SURE * number(weights[near].sum()):
            return own
    shares = weights
    for _ in range(max_iter):
        _, pull = _pull(shares, grams, weights)
        before, shares = shares, pull / pull.sum()
        if number((shares - before).abs().max()) < tol:
            break
    return shares


def _pull(point: Tensor, grams: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return which models are at a point, given by its shares, and each other model's weight over its distance."""
    distances = torch.stack([_length(apart, grams) for apart in (torch.eye(len(point)).to(point) - point).unbind()])
    near = distances <= _NEAR * grams.diagonal().max().sqrt()
    return near, torch.where(near, 0.0, weights / torch.where(near, 1.0, distances))


def _length(shares: Tensor, grams: Tensor) -> Tensor:
    squared: Tensor = shares @ grams @ shares
    return squared.clamp(min=0).sqrt()
