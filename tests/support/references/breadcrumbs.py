"""Model Breadcrumbs by its paper."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["breadcrumbs"]


def breadcrumbs(x: Tensor, density: float, gamma: float) -> Tensor:
    """Model Breadcrumbs (2312.06795) of one flat tensor: without the largest, and without the smallest."""
    count, top = max(1, int(density * len(x))), int(gamma * len(x))
    top = min(top, len(x) - count)
    strongest = x.abs().sort(descending=True).values[top : top + count]
    return torch.where((x.abs() <= strongest[0]) & (x.abs() >= strongest[-1]), x, 0)
