"""RAM and RAM+ by their paper."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ram"]


def ram(
    tau: Tensor, epsilon: float = 1e-3, relative: bool = True, scale: float = 1.0, r: float = 0.0, alpha: float = 0.0
) -> Tensor:
    """RAM (2601.13572): what one model alone changes is added, what several change is averaged over these.

    RAM+ (TL) for r > 0: each model's own entries grow with its shared ones, by r at most alpha.
    """
    threshold = epsilon * tau.square().mean(1, keepdim=True).sqrt() if relative else tau.new_tensor(epsilon)
    active = tau.abs() > threshold
    sharers = active.sum(0)
    merged = torch.zeros_like(tau[0])
    for change, mine in zip(tau, active, strict=True):
        alone, shared = mine & (sharers == 1), mine & (sharers > 1)
        rho = shared.sum().to(tau) / alone.sum()  # infinite without entries of its own, which then need no factor
        merged = merged + torch.where(alone, change * (1 + r * rho.clamp(max=alpha)), 0)
        merged = merged + torch.where(shared, change / sharers, 0)
    return scale * merged
