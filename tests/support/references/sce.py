"""SCE by its paper."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from support.references.weighting import ratio

__all__ = ["sce"]


def sce(
    tau: Tensor, density: float = 0.1, select: Literal["weights", "deltas"] = "weights", scale: float = 1.0
) -> Tensor:
    """SCE (FuseChat, 2408.07990): select by variance, calculate the models' weights, erase minority signs."""
    variance = torch.where((tau == tau[0]).all(0), 0, ((tau - tau.mean(0)) ** 2).mean(0))
    count = max(1, int(density * int((variance > 0).sum())))
    selected = (variance > 0) & (variance >= variance.sort(descending=True).values[count - 1])
    chosen = torch.where(selected, tau, 0) if density < 1 else tau
    squares = chosen.square().sum(1)
    eta = squares / squares.sum() if squares.any() else torch.full_like(squares, 1 / len(tau))
    if select == "deltas":
        tau = chosen
    sign = torch.where(tau.sum(0) >= 0, 1.0, -1.0)
    weight = eta[:, None] * (tau.sign() == sign)
    return scale * ratio((weight * tau).sum(0), weight.sum(0))
