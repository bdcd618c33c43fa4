"""DARE by its paper, for given masks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["dare"]


def dare(tau: Tensor, kept: Tensor, drop: float, rescale: Literal["inverse", "l1", "none"] = "inverse") -> Tensor:
    """DARE (2311.03099) for given masks: drop, then rescale by 1/(1 - p), to the old L1 norms, or not at all."""
    thinned = torch.where(kept, tau, 0)
    if rescale == "inverse":
        return torch.where(kept, tau / (1 - drop), 0)
    if rescale == "l1":
        before, after = tau.abs().sum(-1, keepdim=True), thinned.abs().sum(-1, keepdim=True)
        return thinned * torch.where(after > 0, before / after, 0)
    return thinned
