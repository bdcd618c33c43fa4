"""Compress-then-Merge by its paper, on full matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import decomposed

__all__ = ["ctm"]


def ctm(tau: Tensor, rank: int, beta: float = 0.25, steps: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Compress-then-Merge (2606.03723): bases `U [out, r]` and `V [in, r]` by HOOI, and the models in them.

    Each basis is the left singular vectors of an unfolding of the tensor of all models, of weighted sizes.
    """
    norms = tau.flatten(1).norm(dim=1)
    weights = torch.where(norms > 0, (beta * norms + (1 - beta) * norms.mean()) / norms, 0)
    x = weights[:, None, None] * tau
    u, v = _leading(x, rank), _leading(x.mT, rank)
    for _ in range(steps):
        u = _leading(x @ v, rank)
        v = _leading(x.mT @ u, rank)
    return u, v, u.T @ tau @ v


def _leading(x: Tensor, rank: int) -> Tensor:
    u = decomposed(torch.cat(list(x), 1))[0][:, :rank]
    return u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
