"""Spherical interpolation of two models by weights."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.weighting import Weights, ratio, weights_of

__all__ = ["nuslerp"]


def nuslerp(x: Tensor, weights: Weights = None) -> Tensor:
    """Slerp of the two of `[2, ..., c]` along the last axis, by weights; linear where there is no angle between."""
    first, second = weights_of(weights, x).tolist()
    t = second / (first + second)
    lengths = x.norm(dim=-1, keepdim=True)
    angle = ratio((x[0] * x[1]).sum(-1, keepdim=True), lengths[0] * lengths[1]).clamp(-1, 1).acos()
    arc = (torch.sin((1 - t) * angle) * x[0] + torch.sin(t * angle) * x[1]) / torch.sin(angle)
    chord = (1 - t) * x[0] + t * x[1]
    return torch.where((lengths.prod(0) == 0) | (torch.sin(angle) < 1e-6), chord, arc)
