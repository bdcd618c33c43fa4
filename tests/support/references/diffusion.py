"""Methods that users of diffusion models know, by their released code."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.weighting import ratio

__all__ = ["clamped", "cosine_merge", "train_difference"]


def clamped(merged: Tensor, x: Tensor, stiffness: float = 0.0) -> Tensor:
    """`clamp` of sd-mecha, entry by entry in plain numbers; bounds are the models `x [n, d]`."""
    out = []
    for value, bounds in zip(merged.tolist(), x.T.tolist(), strict=True):
        mean = sum(bounds) / len(bounds)
        above, below = min(b for b in bounds if b >= mean - 1e-15), max(b for b in bounds if b <= mean + 1e-15)
        most = (1 - stiffness) * max(bounds) + stiffness * above
        least = (1 - stiffness) * min(bounds) + stiffness * below
        out.append(min(max(value, least), most))
    return torch.tensor(out, dtype=merged.dtype)


def train_difference(x: Tensor, scale: float = 1.0) -> Tensor:
    """`trainDifference` of supermerger, of A - C and B - C."""
    a, b = x
    share = ratio((b - a).abs(), b.abs() + (b - a).abs())
    return a + b.sign() * share * b.abs() * scale * 1.8


def cosine_merge(x: Tensor, alpha: float = 0.0, variant: str = "a") -> Tensor:
    """`add_cosine_a` and `add_cosine_b` of sd-mecha, of `[2, ...]`."""
    a, b = x
    similar = torch.nn.functional.cosine_similarity(a, b, dim=0, eps=1e-30)
    if variant == "b":
        similar = (similar + (a * b).sum() / (a.norm() * b.norm())) / 2
    return torch.lerp(a, b, 1 - torch.clamp(similar - alpha, 0, 1))
