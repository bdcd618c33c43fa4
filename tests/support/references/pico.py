"""Pico by its paper, on full matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["pico"]


def pico(tau: Tensor, merge: Callable[[Tensor], Tensor], size: float = 1.0) -> Tensor:
    """Pico (2604.16826): the roots of tau tau^T are the Gram matrices of the balanced factors B."""
    moving = [each for each in tau if each.any()]
    if not moving:
        return merge(tau)
    gram = torch.zeros(tau.shape[1], tau.shape[1]).to(tau)
    for each in moving:
        u, s, _ = torch.linalg.svd(each, full_matrices=False)
        gram += u @ torch.diag(s) @ u.T
    energy, u = torch.linalg.eigh(gram)
    energy = energy.clamp(min=0)
    calibrate = u @ torch.diag(1 / (1 + (len(moving) - 1) * energy / energy.sum())) @ u.T
    merged = merge(calibrate @ tau)
    norm = merged.norm()
    return size * merged * (torch.stack([each.norm() for each in moving]).mean() / norm if norm else 0.0)
