"""The Karcher mean: the point of the sphere with the smallest squared distances to all models along the sphere."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.coefficients import column, number
from merging.maths.delta import Delta, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Coefficient, Local, PerModel
from merging.maths.site import Site
from merging.methods.contract.method import Statistics
from merging.methods.families.spherical import OnSphere, check_mean_weights, cosines, gram, plain_weights

__all__ = ["Karcher", "karcher_mean"]


class Karcher(OnSphere):
    """The weighted mean on the sphere of each tensor's direction u_i = x_i / |x_i|, times sum_i w_i |x_i|.

    From the normalized sum_i w_i u_i, it takes steps m <- exp_m(sum_i w_i log_m(u_i)) until a step is shorter than
    `tol` (radians), at most `max_iter`. Every iterate is a weighted sum of the models, so the steps need only their
    inner products: one pass over each tensor gathers them, and one adds up. A zero tensor has no direction and takes no
    part. Directions that cancel out have no unique mean: the first model's direction is then taken. For fine-tunes of
    one base, whose weights are nearly parallel, the result is the plain mean at full length. With `space = changes` it
    averages the directions of their changes, on adapters exactly and without a base.
    """

    name: ClassVar[str] = "karcher"
    summary: ClassVar[str] = "mean direction along the sphere, at the mean length"
    paper: ClassVar[str] = "Karcher mean merging, 2026, arXiv 2603.04972"

    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; at least 0")
    max_iter: Local[Annotated[int, Field(ge=1, le=1_000_000)]] = Field(10, description="most steps")
    tol: Local[Annotated[float, Field(gt=0, lt=1)]] = Field(
        1e-5, description="a step shorter than this ends the search, in radians"
    )

    def check(self, models: int) -> None:
        super().check(models)
        check_mean_weights(self, models, "mean on the sphere")

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        weights = column(self.weights, gram(statistics)).view(-1)
        norms, angles = cosines(gram(statistics))
        taken = norms > 0
        if not taken.any():
            return stack.weighted_sum([0.0] * len(stack))
        mean = karcher_mean(angles[taken][:, taken], weights[taken], self.max_iter, self.tol)
        factors = torch.zeros_like(norms).masked_scatter(taken, mean / norms[taken])
        return stack.weighted_sum(plain_weights(factors * (weights @ norms / weights.sum())))


def karcher_mean(angles: Tensor, weights: Tensor, max_iter: int, tol: float) -> Tensor:
    """Return the coefficients ``[n]`` of the mean as a sum of unit vectors, from the vectors' cosines ``[n, n]``."""
    total = weights.sum()
    if not total:
        return weights
    weights = weights / total

    def length(coefficients: Tensor) -> Tensor:
        return (coefficients @ angles @ coefficients).clamp(min=0).sqrt()

    # directions that cancel out have many means: the search then starts at the first
    mean = weights / length(weights) if number(length(weights)) >= tol else torch.eye(len(weights)).to(weights)[0]
    for _ in range(max_iter):
        dots = (angles @ mean).clamp(-1, 1)
        omega = torch.acos(dots)
        near = (omega < tol) | (omega.sin() < 1e-12)
        pull = torch.where(near, 0.0, weights * omega / torch.where(near, 1.0, omega.sin()))
        tangent = pull - (pull @ dots) * mean
        step = length(tangent)
        if number(step) < tol:
            break
        mean = step.cos() * mean + step.sin() * tangent / step
        mean = mean / length(mean)
    return mean
