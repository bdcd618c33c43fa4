"""DC-Merge by its released code, on whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import decomposed, polar

__all__ = ["dc_merge", "diagonal_dc_merge"]


def _directions(tau: Tensor, smooth: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    count = max(1, min(tau.shape[1:]) // len(tau))
    us, energies, vhs = [], [], []
    for each in tau:
        u, s, vh = (part[:count] for part in (lambda u, s, vh: (u.T, s, vh))(*decomposed(each)))
        weights = {
            "none": s,
            "mean": torch.ones_like(s),
            "linear": torch.linspace(min(5.0, float(s[0] / s[-1])), 1, len(s), dtype=s.dtype) if len(s) else s,
        }[smooth]
        us, vhs = [*us, u.T], [*vhs, vh]
        energies.append(weights * s.sum() / weights.sum() if len(s) else s)
    return us, energies, vhs


def dc_merge(tau: Tensor, scale: float = 1.2, keep: float = 0.001, smooth: str = "mean") -> Tensor:
    """DC-Merge (2603.06242): equal energies, the largest entries in the common space, and the blocks of one model."""
    us, energies, vhs = _directions(tau, smooth)
    left, right = polar(torch.cat(us, 1)), polar(torch.cat(vhs))
    width = left.shape[1]
    owner = torch.cat([torch.full((len(each),), i) for i, each in enumerate(energies)])
    inside = []
    for u, energy, vh in zip(us, energies, vhs, strict=True):
        there = left.T @ u @ torch.diag(energy) @ vh @ right.T
        count = max(len(energy), int(keep * width**2))
        largest = there.abs().flatten().sort(descending=True).values
        if len(energy):
            there = torch.where(there.abs() >= largest[count - 1] * (1 - 1e-6), there, 0)
        inside.append(there)
    values = torch.stack(inside)
    total = values.sum(0)
    agrees = values * torch.where(total.abs() > 1e-6 * values.abs().sum(0), total.sign(), 0) > 0
    mean = torch.where(agrees, values, 0).sum(0) / agrees.sum(0).clamp(min=1)
    return scale * left @ (mean * (owner[:, None] == owner)) @ right


def diagonal_dc_merge(tau: Tensor, scale: float = 1.2) -> Tensor:
    """DC-Merge where only the diagonal is kept: TSV with equal energies, shared directions attenuated."""
    us, energies, vhs = _directions(tau, "mean")
    u, vh, energy = torch.cat(us, 1), torch.cat(vhs), torch.cat(energies)
    left, right = polar(u), polar(vh)
    values = energy * (u * left).sum(0) * (vh * right).sum(1)
    return scale * left @ torch.diag(values) @ right
