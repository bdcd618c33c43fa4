"""The probabilities of DELLA."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["della_probabilities"]


def della_probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA (2406.11617): how likely each entry of `[r, c]` is kept, by its rank in the row; equals by position."""
    out = torch.empty_like(rows)
    for row, into in zip(rows, out, strict=True):
        for rank, position in enumerate(row.abs().argsort(stable=True)):
            into[position] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return out
