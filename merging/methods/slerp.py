"""Slerp: walk from one model to another along the sphere instead of the chord."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from merging.delta import Delta, Stack
from merging.folds import Sum
from merging.linalg import spans
from merging.method import Method, Round, Seen
from merging.parameters import Coefficient, Local
from merging.site import Site

__all__ = ["Slerp", "slerp_weights"]

COLLINEAR = 0.9995
"""Cosine from which the arc is so flat that its formula loses digits and the chord is taken, as is customary."""


class Slerp(Method):
    """Each tensor a step t along the arc from the first model's to the second's (Shoemake 1985).

    theta = (sin((1-t) omega) v0 + sin(t omega) v1) / sin(omega), with omega the angle between the two tensors taken
    flat, and v0, v1 the tensors themselves, not normalised. Nearly collinear tensors (cosine beyond 0.9995, most
    fine-tunes of one base) and zero tensors are interpolated linearly. Merges the weights, so adapters need the base.
    Costs two passes over each tensor.
    """

    name: ClassVar[str] = "slerp"
    summary: ClassVar[str] = "spherical interpolation between two models"
    paper: ClassVar[str] = "Animating Rotation with Quaternion Curves, Shoemake 1985"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    t: Local[Coefficient] = Field(0.5, description="0 is the first model, 1 the second")

    @property
    def origin(self) -> Literal["base", "none"]:
        return "none"

    def rounds(self) -> tuple[Round, ...]:
        return (Round("products", Sum(), _products, per="tensor"),)

    def merge(self, stack: Stack, site: Site, seen: Seen) -> Delta:
        return stack.weighted_sum(slerp_weights(seen["products"], self.t))


def _products(stack: Stack, site: Site, seen: Seen) -> Tensor:
    """v0.v0, v1.v1 and v0.v1 over spans so short that float32 loses nothing that matters; the fold adds them up."""
    whole, rest = spans(stack.dense())
    whole = whole.transpose(0, 1)
    grams = torch.cat([whole @ whole.mT, (rest @ rest.mT)[None]])
    return torch.stack([grams[:, 0, 0], grams[:, 1, 1], grams[:, 0, 1]])


def slerp_weights(products: Tensor, t: float | Tensor) -> list[float | Tensor]:
    """The weights of v0 and v1, from ``products = (v0.v0, v1.v1, v0.v1)``."""
    first, second, cross = products.tolist()
    cosine = cross / math.sqrt(first * second) if first and second else 1.0
    if abs(cosine) > COLLINEAR:
        return [1 - t, t]
    omega = math.acos(cosine)
    return [_sine((1 - t) * omega) / math.sin(omega), _sine(t * omega) / math.sin(omega)]


def _sine(angle: float | Tensor) -> float | Tensor:
    return torch.sin(angle) if isinstance(angle, Tensor) else math.sin(angle)
