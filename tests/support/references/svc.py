"""Singular value calibration by its paper and released code."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import decomposed

__all__ = ["svc"]


def svc(tau: Tensor, merged: Tensor, alpha: float = 0.1, align: str = "outputs") -> Tensor:
    """SVC (2602.05536): each singular value of a merge times T / sum_i max(alpha, s_i), direction by direction."""
    if align == "inputs":
        return svc(tau.mT, merged.T, alpha).T
    out = torch.zeros_like(merged)
    models = [each for each in tau if each.any()]
    for u, s, vh in zip(*_rows(merged), strict=True):
        total = 0.0
        for each in models:
            response = u @ each
            size = float(response @ response)
            share = float(u @ merged @ response) / size if size > 1e-12 * float(each.norm() ** 2) else 0.0
            total += max(alpha, share)
        out += s * len(models) / total * torch.outer(u, vh)
    return out


def _rows(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = decomposed(matrix)
    return u.T, s, vh
