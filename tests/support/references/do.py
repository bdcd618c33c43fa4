"""DO-Merging by its paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support.references.orthogonalize import orthogonalized

__all__ = ["balanced", "decoupled", "do_merging"]


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced factors `(U sqrt(S), sqrt(S) V^T)` of a product of rank at most r, from its dense SVD."""
    u, sigma, vh = torch.linalg.svd(up @ down, full_matrices=False)
    root = sigma[: up.shape[1]].sqrt()
    return u[:, : len(root)] * root, root[:, None] * vh[: len(root)]


def decoupled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """DO-Merging, step 2: column norms `[n, k]` and unit columns `[n, m, k]`; a column of rounding error has none."""
    magnitudes = matrices.norm(dim=-2)
    dead = magnitudes <= 32 * torch.finfo(matrices.dtype).eps * magnitudes.norm(dim=-1, keepdim=True)
    return magnitudes, torch.where(dead[:, None], 0, matrices / magnitudes[:, None])


def do_merging(
    pairs: Sequence[tuple[Tensor, Tensor]], steps: int = 100, gamma: float = 1.0, scale: float = 1.0
) -> Tensor:
    """DO-Merging (2505.15875) of one module, written out: mean magnitude times mean direction, column by column."""
    factors = [balanced(up, down) for up, down in pairs]
    ups = orthogonalized([up.T for up, _ in factors], steps, gamma)
    downs = orthogonalized([down for _, down in factors], steps, gamma)
    magnitudes, directions = decoupled(torch.stack([up.T @ down for up, down in zip(ups, downs, strict=True)]))
    return scale * magnitudes.mean(0) * directions.mean(0)
