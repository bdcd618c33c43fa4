"""MagMax by its paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support.references.flat import column

__all__ = ["magmax"]


def magmax(tau: Tensor, weights: Sequence[float] | None = None, scale: float = 1.0) -> Tensor:
    """MagMax (2407.06322): per entry the weighted change of largest magnitude, + where +m and -m tie."""
    changes = column(tau, weights) * tau
    high, low = changes.amax(0), changes.amin(0)
    return scale * torch.where(high >= -low, high, low)
