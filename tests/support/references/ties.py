"""TIES by its paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from support.references.flat import add_up, column

__all__ = ["ties"]


def ties(
    tau: Tensor,
    density: float | Sequence[float] = 0.2,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    vote: Literal["plain", "weighted"] = "plain",
    zero: Literal["majority", "plus"] = "majority",
    normalize: bool = True,
) -> Tensor:
    """TIES (2306.01708, algorithm 1): trim, elect a sign, average what agrees; ties at the threshold are kept."""
    n, d = tau.shape
    w = column(tau, weights)
    densities = [density] * n if isinstance(density, (int, float)) else density
    counts = [max(1, int(share * d)) for share in densities]
    thresholds = [row.abs().sort(descending=True).values[k - 1] for row, k in zip(tau, counts, strict=True)]
    trimmed = torch.where(tau.abs() >= torch.stack(thresholds)[:, None], tau, 0)

    elected = add_up(trimmed * (w if vote == "weighted" else w.sign())).sign()
    majority = elected.sum().sign() if zero == "majority" else torch.zeros_like(elected.sum())
    elected = torch.where(elected == 0, torch.where(majority == 0, 1, majority), elected)

    agrees = trimmed * w.sign() * elected > 0
    merged = add_up(torch.where(agrees, w * trimmed, 0))
    if normalize:
        voters = add_up(torch.where(agrees, w.abs(), 0))
        merged = merged / torch.where(voters == 0, 1, voters)
    return scale * merged
