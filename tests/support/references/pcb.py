"""PCB-Merging by its paper and by its released programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from support.references.flat import add_up, column, min_max

__all__ = ["pcb"]


def pcb(
    tau: Tensor,
    ratio: float = 0.1,
    clip: float = 0.01,
    variant: Literal["code", "vision", "es", "paper"] = "code",
    weights: Sequence[float] | None = None,
    scale: float = 1.2,
) -> Tensor:
    """PCB-Merging (2410.02396): intra times inter balancing, drop all but `ratio`, average with the scores as weights.

    `paper` is its equations; `code`, `vision` and `es` are the released programs, which clip both tails first.
    """
    n, d = tau.shape
    w = column(tau, weights)
    if variant == "paper":
        intra = torch.softmax(n * min_max(tau * tau), -1)
        inter = add_up(torch.softmax(min_max(tau * other), -1) for other in tau)
        beta = intra * inter
        score = torch.where(beta >= beta.sort().values[:, int(d * (1 - ratio)), None], beta, 0)
        mass = add_up(score)
        return scale * torch.where(mass > 0, add_up(w * tau * score) / mass, 0)

    ordered = tau.abs().sort().values
    low, high = ordered[:, int(d * clip), None], ordered[:, int(d * (1 - clip) - 1), None]
    magnitude = tau.abs().clamp(low, high)
    clipped = tau.sign() * magnitude
    unit = min_max(magnitude)
    signed = tau.sign() * unit

    intra = torch.exp(n * unit**2)
    if variant == "code":
        inter = torch.tanh(tau * add_up(tau))
    elif variant == "vision":
        inter = torch.tanh(tau * add_up(signed))
    else:
        inter = add_up(torch.tanh(signed * other) for other in signed)
    beta = intra * inter
    # The threshold is the least of what stays, so this min-max is (max(beta, t) - t) / (max beta - t).
    score = min_max(torch.maximum(beta, beta.sort().values[:, int(d * (1 - ratio)), None]))
    return scale * (add_up(w * clipped * score) / add_up(score).clamp(min=1e-12))
