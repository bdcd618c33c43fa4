"""STAR by its paper."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import decomposed

__all__ = ["star"]


def star(tau: Tensor, scale: float = 1.0, eta: float = 0.4) -> Tensor:
    """STAR (2502.10339): truncate to the share eta of the nuclear norm, restore that norm, and average."""
    out = torch.zeros_like(tau[0])
    for each in tau:
        u, s, vh = decomposed(each)
        rank = next((r for r in range(1, len(s) + 1) if s[:r].sum() >= eta * s.sum() * (1 - 1e-9)), 0)
        if rank:
            out += s.sum() / s[:rank].sum() * u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    return scale * out / len(tau)
