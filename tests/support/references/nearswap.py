"""NearSwap by its formula."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearswap"]


def nearswap(a: Tensor, b: Tensor, t: float = 0.001) -> Tensor:
    """The base a, drawn to b the more the nearer the two are: all the way where they are no more than t apart."""
    weight = torch.where(a == b, 1, (t / (a - b).abs()).clamp(0, 1))
    return a + weight * (b - a)
