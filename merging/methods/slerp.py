"""Slerp: walk from one model to another along the sphere instead of the chord."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, Stack
from merging.maths.lazy_torch import torch
from merging.maths.parameters import Coefficient, Local
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistic, Statistics
from merging.methods.families.spherical import GRAM, arc_weights, gram, plain_weights

__all__ = ["Slerp"]

COLLINEAR = 0.9995
"""Cosine from which the chord is taken, as is customary: the arc is so flat that its formula loses digits."""


class Slerp(Method):
    """Move each tensor a step t along the arc from the first model's to the second's (Shoemake 1985).

    theta = (sin((1-t) omega) v0 + sin(t omega) v1) / sin(omega), where omega is the angle between the two tensors as
    vectors, and v0, v1 are the tensors, not normalized. Nearly collinear tensors (cosine beyond 0.9995, most fine-tunes
    of one base) and zero tensors are interpolated linearly. It merges weights, so adapters need the base. Costs two
    passes over each tensor.
    """

    name: ClassVar[str] = "slerp"
    summary: ClassVar[str] = "spherical interpolation between two models"
    paper: ClassVar[str] = "Animating Rotation with Quaternion Curves, Shoemake 1985"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    t: Local[Coefficient] = Field(0.5, description="0 is the first model, 1 the second")

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        return "weights"

    def required_statistics(self) -> tuple[Statistic, ...]:
        return (GRAM,)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        return stack.weighted_sum(plain_weights(torch.stack(arc_weights(gram(statistics), self.t, COLLINEAR))))
