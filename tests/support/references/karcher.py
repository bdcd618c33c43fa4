"""The Karcher mean on the sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.weighting import Weights, weights_of

__all__ = ["karcher"]


def karcher(x: Tensor, weights: Weights = None, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The Karcher mean of the unit vectors on the sphere (2603.04972), times the mean length.

    Zeros have a length but no direction.
    """
    w, lengths = weights_of(weights, x), x.norm(dim=1)
    alive, length = lengths > 0, w @ lengths / w.sum()
    if not alive.any():
        return torch.zeros_like(x[0])
    w, unit = w[alive] / w[alive].sum(), x[alive] / lengths[alive, None]
    mean = w @ unit
    mean = mean / mean.norm()
    for _ in range(max_iter):
        cosine = (unit @ mean).clamp(-1, 1)
        angle = cosine.acos()
        tangent = (w * torch.where(angle < 1e-9, 1, angle / torch.sin(angle))) @ (unit - cosine[:, None] * mean)
        size = tangent.norm()
        if size < tol:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * tangent / size
        mean = mean / mean.norm()
    return mean * length
