"""The barycentre on the sphere in one tangent step."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.weighting import Weights, ratio, weights_of

__all__ = ["multislerp"]


def multislerp(x: Tensor, weights: Weights = None, normalize: bool = True) -> Tensor:
    """The barycentre of the unit vectors on the sphere, in one tangent step from their mean; times the mean length."""
    w = weights_of(weights, x)
    w = (w / w.sum() if normalize else w)[:, None]
    lengths = x.norm(dim=1, keepdim=True)
    unit = ratio(x, lengths)
    mean = (w * unit).sum(0)
    mean = ratio(mean, mean.norm())
    tangent = (w * (unit - (unit @ mean)[:, None] * mean)).sum(0)
    size = tangent.norm()
    direction = torch.cos(size) * mean + torch.sin(size) * ratio(tangent, size)
    return direction * (w * lengths).sum()
