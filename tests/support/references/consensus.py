"""Consensus Task Arithmetic by its paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support.references.flat import add_up, column

__all__ = ["consensus"]


def consensus(
    tau: Tensor, threshold: float = 0.4, agree: int = 2, weights: Sequence[float] | None = None, scale: float = 1.0
) -> Tensor:
    """Consensus Task Arithmetic (2405.07813): the sum, where the TALL masks of at least `agree` models hold."""
    changes = column(tau, weights) * tau
    total = add_up(changes)
    masks = changes.abs() >= threshold * (total - changes).abs()
    return scale * torch.where(masks.sum(0) >= agree, total, 0)
