"""The descent of DO-Merging that makes factors orthogonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["orthogonalized"]


def orthogonalized(factors: Sequence[Tensor], steps: int = 100, gamma: float = 1.0) -> list[Tensor]:
    """DO-Merging (2505.15875), step 1: gradient descent on the overlaps of the factors' row spaces.

    f(V) = sum over i != j of |V_i V_j^T|^2 + gamma sum over i of |V_i - V_i(0)|^2, on factors of unit norm.
    """
    sizes = [len(factor) for factor in factors]
    norms = [torch.where(factor.norm() > 0, factor.norm(), 1) for factor in factors]
    start = torch.cat([factor / norm for factor, norm in zip(factors, norms, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(factors)), torch.tensor(sizes)).to(start.device)
    others = owner[:, None] != owner[None, :]

    def objective(v: Tensor) -> Tensor:
        return (v @ v.T)[others].square().sum() + gamma * (v - start).square().sum()

    v, eta = start, 1.0
    for _ in range(steps):
        gradient = 4 * torch.where(others, v @ v.T, 0) @ v + 2 * gamma * (v - start)
        if not gradient.any():
            break
        while objective(v - eta * gradient) > objective(v) - eta / 2 * gradient.square().sum() and eta >= 1e-12:
            eta /= 2
        if eta < 1e-12:
            break
        v = v - eta * gradient
        eta *= 2
    return [norm * piece for norm, piece in zip(norms, v.split(sizes), strict=True)]
