"""Multislerp: the weighted mean direction of any number of models, at their weighted mean length."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from merging.errors import InputError, OptionError, option
from merging.maths.coefficients import column, number
from merging.maths.delta import Delta, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Local
from merging.maths.site import Site
from merging.methods.contract.method import Statistics
from merging.methods.families.spherical import OnSphere, cosines, gram, plain_weights

__all__ = ["MultiSlerp"]

_VANISHED = 1e-8


class MultiSlerp(OnSphere):
    """m * sum_i w_i |x_i|, where m is the direction of sum_i w_i x_i / |x_i|, for each tensor x as one vector.

    The published procedure then walks from m along the tangent T = sum_i w_i (u_i - (u_i . m) m) with u_i = x_i/|x_i|.
    That sum is zero for any models, as sum_i w_i u_i is parallel to m, so the procedure computes the mean above.
    `karcher` is the mean along the sphere. The tensors are the weights, or with `space = changes` the changes from a
    base; on adapters changes are merged exactly, without a base. Directions that cancel out have no mean: two models
    are then added as they are, and more are an error. Costs two passes over each tensor.
    """

    name: ClassVar[str] = "multislerp"
    summary: ClassVar[str] = "mean direction of all models at their mean length"
    paper: ClassVar[str] = "MultiSLERP, Goddard 2025, in mergekit"

    normalize: Local[bool] = Field(True, description="divide the weights by their sum")

    def check(self, models: int) -> None:
        super().check(models)
        if self.normalize and not self.varies and sum(map(number, self.coefficients(models))) == 0:
            raise OptionError(
                f"the weights of multislerp sum to zero, so there is no mean: change them, or use "
                f"{option('normalize', False)}"
            )

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        weights = column(self.weights, gram(statistics)).view(-1)
        weights = weights / weights.sum() if self.normalize else weights
        return stack.weighted_sum(plain_weights(self._on_the_sphere(weights, gram(statistics), site)))

    def _on_the_sphere(self, weights: Tensor, grams: Tensor, site: Site) -> Tensor:
        """Return the multiple of each tensor."""
        norms, angles = cosines(grams)
        if not norms.any():
            return weights
        length = (weights @ angles @ weights).clamp(min=0).sqrt()
        if number(length) <= _VANISHED * number(weights.abs().sum()):
            if len(weights) == 2:
                return weights
            raise InputError(
                f"{site.name}: the models' directions cancel out, so there is no mean on the sphere: change the weights"
            )
        return torch.where(norms > 0, weights / torch.where(norms > 0, norms, 1.0), 0.0) * (weights @ norms) / length
