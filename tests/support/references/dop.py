"""DOP by its paper: the minimum of its loss, model by model."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import CUT

__all__ = ["dop", "dop_loss"]


def dop_loss(merged: Tensor, held: Tensor, change: Tensor, alpha: float) -> Tensor:
    """The loss of a step of DOP: what the merge differs in from both, as each of them sees it."""
    losses = [(x.T @ (merged - x)).square().sum() + ((merged - x) @ x.T).square().sum() for x in (held, change)]
    return alpha * losses[0] + (1 - alpha) * losses[1]


def dop(tau: Tensor, alpha: float = 0.8, scale: float = 1.0) -> Tensor:
    """DOP (NeurIPS 2025): A S + S B = C, by singular vectors of the models side by side and on top of each other."""
    merged = tau[0]
    for each in tau[1:]:
        one, other = alpha**0.5 * merged, (1 - alpha) ** 0.5 * each
        u, out, _ = torch.linalg.svd(torch.cat([one, other], 1))
        _, inner, vh = torch.linalg.svd(torch.cat([one, other]))
        square = torch.zeros(len(u), len(vh)).to(tau)
        square += torch.nn.functional.pad(out.square(), (0, len(u) - len(out)))[:, None]
        square += torch.nn.functional.pad(inner.square(), (0, len(vh) - len(inner)))
        target = u.T @ (2 * alpha * merged @ merged.T @ merged + 2 * (1 - alpha) * each @ each.T @ each) @ vh.T
        start = u.T @ (alpha * merged + (1 - alpha) * each) @ vh.T
        merged = u @ torch.where(square > CUT * square.max(), target / square, start) @ vh
    return scale * merged
