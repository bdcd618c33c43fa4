"""VaRM by its paper."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["varm"]


def varm(tau: Tensor, scale: float = 1.0) -> Tensor:
    """VaRM (FuseChat, 2408.07990): models weighted by the mean square of their change."""
    squares = tau.square().mean(1)
    eta = squares / squares.sum() if squares.any() else torch.full_like(squares, 1 / len(tau))
    return scale * (eta[:, None] * tau).sum(0)
