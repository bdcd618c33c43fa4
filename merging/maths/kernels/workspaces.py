"""Space in which kernels keep intermediate results, as they cannot allocate any."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["CHUNK", "make_workspace"]

CHUNK = 1024
"""Elements that loops go through at once, so that what they compute of them stays in the nearest cache."""


def make_workspace(rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return space for a number of chunks, ``[rows, CHUNK]``, float32 by default."""
    return torch.empty(rows, CHUNK, dtype=dtype or torch.float32)
