"""The weighted sum, truncated."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.weighting import Weights, weights_of

__all__ = ["svd"]


def svd(
    tau: Tensor, energy: float = 0.95, components: int | None = None, weights: Weights = None, scale: float = 1.0
) -> Tensor:
    """The weighted sum, truncated to a share of its energy and a number of components."""
    u, s, vh = torch.linalg.svd((weights_of(weights, tau)[:, None, None] * tau).sum(0), full_matrices=False)
    shares = s.square().cumsum(0) / s.square().sum()
    count = 1 + int((shares < energy).sum()) if energy < 1 else len(s)
    count = count if components is None else min(count, components)
    return scale * u[:, :count] @ torch.diag(s[:count]) @ vh[:count]
