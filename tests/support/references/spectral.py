"""Singular value decompositions with a cut-off."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CUT", "decomposed", "joint_basis", "mean_of", "polar", "rounded"]

CUT = 1e-6


def decomposed(matrix: Tensor, least: Tensor | float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD without the singular values up to `least`, by default the cut-off times the largest."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > (CUT * s[:1] if least is None else least)
    return u[:, kept], s[kept], vh[kept]


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows; of a rank-deficient one, on its range."""
    u, _, vh = decomposed(matrix)
    return u @ vh


def mean_of(values: Tensor) -> Tensor:
    return values.sum() / max(1, len(values))


def joint_basis(tau: Tensor) -> Tensor:
    """The left singular vectors of the models side by side, of each of which the entry largest in size is positive."""
    u = decomposed(torch.cat(list(tau), 1))[0]
    return u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()


def rounded(parts: Tensor) -> Tensor:
    """Without the last bits, which depend on the processor: opposite models cancel out, and an election is tied."""
    if not parts.any():
        return parts
    step = parts.abs().max() * 2.0**-40
    return (parts / step).round() * step
