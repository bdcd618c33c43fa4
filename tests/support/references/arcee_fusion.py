"""Arcee Fusion by its formulas."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["arcee_fusion"]


def arcee_fusion(a: Tensor, b: Tensor) -> Tensor:
    """The base a, with the entries of b that matter: changed much, in rows whose softmax changed much."""
    p, q = (torch.softmax(each, -1) for each in (b, a))
    importance = (b - a).abs() * (p * (p.log() - q.log())).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return torch.where(importance >= median + 1.5 * (high - low), b, a)
