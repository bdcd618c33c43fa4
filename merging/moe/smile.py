"""SMILE: sparse mixtures of low-rank experts from the singular vectors of changes.

Tang, Shen, Luo, Xie, Hu, Zhang, Du, Tao: SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From
Pre-Trained Foundation Models, 2024, arXiv 2408.10174. For a linear layer ``W``, ``b`` of the base and the changes
``D_i = U_i S_i V_i^T`` and ``d_i`` of its fine-tunes:

    r_i = || V_i[:, :gate_rank]^T x ||            the router, of the leading right singular vectors
    p   = softmax of the largest experts_per_token of r
    y   = W x + b + sum_i p_i (U_i S_i V_i^T x + d_i),    cut to the leading ``rank`` directions
"""

from __future__ import annotations

from collections.abc import Sequence

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import decompose, factored_svd, krylov_svd
from merging.moe.source import MoeSource

__all__ = ["available_rank", "decompose_change", "read_change", "same_checkpoint"]

_LARGE = 512
"""Matrices with shorter sides are decomposed exactly, and larger ones where many directions are wanted."""


def same_checkpoint(one: MoeSource, other: MoeSource) -> bool:
    """Return whether two sources are the same full model, and differ by their adapters at most."""
    return one.checkpoint.path == other.checkpoint.path


def read_change(source: MoeSource, base: MoeSource, name: str) -> Delta:
    """Return the change of a tensor from the base, as factors where an adapter of the base holds factors."""
    stored = base.find_stored(name)
    dtype = torch.float64 if stored.dtype_name == "F64" else torch.float32
    if same_checkpoint(source, base) and not base.changes:
        change = source.changes.get(name)
        if change is None:
            return Dense(torch.zeros(stored.shape, dtype=dtype))
        return change.read(stored.shape, lambda: stored.read().to(dtype), dtype)
    return Dense(source.read(name, dtype) - base.read(name, dtype))


def available_rank(source: MoeSource, base: MoeSource, name: str, shape: Sequence[int]) -> int:
    """Return the largest rank that a change of a matrix may have, from headers alone; 0 if there is none."""
    full = min(shape)
    if same_checkpoint(source, base) and not base.changes:
        change = source.changes.get(name)
        if change is None:
            return 0
        return min(change.rank, full) if change.low_rank and change.rank else full
    return full


def decompose_change(change: Delta, rows: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the leading directions of a matrix's change, in float64.

    Args:
        change: the change, ``[out, in]``.
        rows: the number of right singular vectors.
        rank: the number of left singular vectors.
        device: the device to compute on.

    Returns:
        ``up [out, rank]``, the left singular vectors times the singular values, and ``down [rows, in]``, the right
        ones. Directions that the change does not have are zero.
    """
    if isinstance(change, LowRank) and not change.transposed:
        u, s, vh = factored_svd(change.up.to(device), change.down.to(device))
    else:
        matrix, needed = change.dense().to(device), max(rows, rank)
        if min(matrix.shape) > _LARGE and 8 * needed <= min(matrix.shape):
            u, s, vh = krylov_svd(matrix, needed)
        else:
            u, s, vh = decompose(matrix.double(), needed=needed)
    real = s > 1e-12 * s[:1].clamp(min=torch.finfo(torch.float64).tiny)
    vh = vh * real[:, None]
    up, down = u.new_zeros(u.shape[0], rank), u.new_zeros(rows, vh.shape[1])
    held, seen = min(rank, len(s)), min(rows, len(s))
    up[:, :held], down[:seen] = u[:, :held] * (s * real)[:held], vh[:seen]
    return up.cpu(), down.cpu()
