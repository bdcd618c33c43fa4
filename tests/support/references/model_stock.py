"""Model Stock by its paper."""

from __future__ import annotations

from torch import Tensor

from support.references.weighting import ratio

__all__ = ["model_stock"]


def model_stock(tau: Tensor) -> Tensor:
    """Model Stock (2403.19522) along the last axis: the mean, as far from the base as the angles say."""
    n = len(tau)
    unit = ratio(tau, tau.norm(dim=-1, keepdim=True))
    pairs = [(unit[i] * unit[j]).sum(-1, keepdim=True) for i in range(n) for j in range(i)]
    cosine = sum(pairs) / len(pairs)
    return ratio(n * cosine, 1 + (n - 1) * cosine) * tau.mean(0)
