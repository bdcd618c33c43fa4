"""LARV by the formula of its port, on the matrices of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["larv_factors"]


def _spread_of(matrix: Tensor) -> float:
    shares = torch.linalg.svdvals(matrix).square()
    shares = shares[shares > 0] / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def larv_factors(
    base: Mapping[str, Tensor], change: Mapping[str, Tensor], depths: Mapping[str, float], strength: float = 0.5
) -> dict[str, float]:
    """LARV (2602.09413): the factor of each matrix ``[out, in]`` of one model; `depths` are (l + 1) / L by name."""
    conflicts = {}
    for name in depths:
        w, d = base[name], change[name]
        left, right = w @ d.T - d @ w.T, w.T @ d - d.T @ w
        conflicts[name] = float((left.norm() + right.norm()) / 2 / (w.norm() * d.norm()))
    values = torch.tensor(list(conflicts.values()), dtype=torch.float64)
    out = {}
    for name, depth in depths.items():
        z = (conflicts[name] - float(values.mean())) / float(values.std(correction=0))
        rank = _spread_of(base[name]) / _spread_of(change[name])
        score = rank * depth**0.5 / (1 + torch.nn.functional.softplus(torch.tensor(z, dtype=torch.float64)))
        out[name] = float(1 + strength * torch.tanh(3 * (score - 1)))
    return out
