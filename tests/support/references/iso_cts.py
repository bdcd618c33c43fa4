"""Iso-CTS by its paper."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import CUT, decomposed, mean_of, polar

__all__ = ["iso_cts"]


def iso_cts(tau: Tensor, scale: float = 1.5, common: float = 0.8) -> Tensor:
    """Iso-CTS (2502.04959): leading directions of the sum, and of what each model has beside them; all alike."""
    u, s, vh = decomposed(tau.sum(0))
    own = round(len(s) * (1 - common) / len(tau))
    shared = len(s) - own * len(tau)
    parts = [(u[:, :shared], s[:shared], vh[:shared])]
    for each in tau:
        rest = each - parts[0][0] @ parts[0][0].T @ each
        first, values, second = decomposed(rest, CUT * torch.linalg.matrix_norm(each, 2))
        parts.append((first[:, :own], values[:own], second[:own]))
    u, s, vh = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    return scale * mean_of(s) * (polar(u) @ polar(vh))
