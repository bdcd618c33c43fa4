"""Weights of models, and quotients without a division by zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Weights", "ratio", "weights_of"]

Weights = Sequence[float] | None


def weights_of(weights: Weights, like: Tensor) -> Tensor:
    return like.new_tensor([1.0] * len(like) if weights is None else weights)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))
