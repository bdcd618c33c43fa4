"""RegMean and Fisher merging, naively, from the inputs and gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fisher", "regmean"]


def regmean(tau: Tensor, inputs: Sequence[Tensor], keep: float = 0.9, weights: Sequence[float] | None = None) -> Tensor:
    """Of changes `[n, out, in]` and inputs `[tokens, in]` of each model, by the normal equations with a ridge."""
    ridge = 1e-6 * max(float(x.double().square().mean()) for x in inputs)
    left = torch.zeros(tau.shape[2], tau.shape[2], dtype=torch.float64)
    right = torch.zeros(tau.shape[2], tau.shape[1], dtype=torch.float64)
    for number, (change, x) in enumerate(zip(tau.double(), inputs, strict=True)):
        gram = x.double().T @ x.double() / len(x)
        for row in range(len(gram)):
            for column in range(len(gram)):
                gram[row, column] *= 1 if row == column else keep
            gram[row, row] += ridge
        weight = 1 if weights is None else weights[number]
        left += weight * gram
        right += weight * gram @ change.T
    return torch.linalg.solve(left, right).T


def fisher(tau: Tensor, importance: Tensor) -> Tensor:
    """Of changes and importances `[n, d]`."""
    merged = torch.zeros_like(tau[0], dtype=torch.float64)
    for place in range(tau.shape[1]):
        shares = importance[:, place].double() / importance[:, place].double().sum()
        merged[place] = sum(share * change for share, change in zip(shares, tau[:, place].double(), strict=True))
    return merged
