"""Decompositions through thin factors: a product of rank r never becomes its full matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from merging.delta import Delta, LowRank

__all__ = ["balance", "compress", "even", "factored_svd", "safe_ratio", "spans", "squared_norm", "truncate"]

_SPAN = 1 << 12

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


def safe_ratio(numerator: float, denominator: float) -> float:
    """``numerator / denominator``, and 0 where the denominator is 0: a change that vanished has no size to restore."""
    return numerator / denominator if denominator else 0.0


def spans(values: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, *shape]`` flat, in spans so short that a float32 sum loses nothing that matters: ``[n, s, span]``, and the
    rest ``[n, r]``.
    """
    flat = values.reshape(len(values), -1)
    whole = flat.shape[1] // _SPAN * _SPAN
    return flat[:, :whole].reshape(len(flat), whole // _SPAN, _SPAN), flat[:, whole:]


def factored_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD ``U [out, k], S [k], Vh [k, in]`` of ``up @ down``, with ``k = min(out, r, in)``.

    Two thin QRs and one small core in float64: O((out + in) r^2) instead of O(out in min(out, in)).
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return q_up @ u, s, vh @ q_down.mT


def balance(delta: LowRank) -> LowRank:
    """The same change with the singular values of the product split evenly between its factors, float64."""
    u, s, vh = factored_svd(delta.up, delta.down)
    return _balanced(u, s, vh, len(s), torch.float64, delta.shape, delta.transposed)[0]


def even(delta: LowRank, dtype: torch.dtype) -> LowRank:
    """The same product with the size of every term of rank one split evenly between its factors, in a type.

    Neither factor then leaves the range of half precision before the product does.
    """
    up, down = delta.up.double(), delta.down.double()
    sizes = torch.linalg.vector_norm(down, dim=-1), torch.linalg.vector_norm(up, dim=-2)
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], 1.0).sqrt()
    up, down = up * ratio[..., None, :], down / ratio[..., :, None]
    return LowRank(up.to(dtype), down.to(dtype), delta.shape, delta.transposed)


def truncate(delta: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best approximation of ``delta`` of at most ``rank`` (Frobenius norm), and the share of energy it discards.

    The singular values are split evenly between the factors, which keeps both in the range of half precision.
    """
    if delta.rank <= rank:
        return delta, 0.0
    u, s, vh = factored_svd(delta.up, delta.down)
    return _balanced(u, s, vh, rank, delta.up.dtype, delta.shape, delta.transposed)


def compress(
    matrix: Tensor, rank: int, shape: tuple[int, ...] | None = None, transposed: bool = False
) -> tuple[LowRank, float]:
    """Factors of at most ``rank`` for a full ``matrix [out, in]``, and the share of energy they discard.

    A randomised range finder (Halko, Martinsson, Tropp 2011, algorithm 4.4) with a fixed seed. ``shape`` and
    ``transposed`` describe the base tensor that the factors belong to, as in :class:`~merging.delta.LowRank`.
    """
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ probe.to(matrix))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis)[0])[0]
    u, s, vh = factored_svd(basis, basis.mT @ matrix)
    shape = tuple(matrix.shape) if shape is None else shape
    factors, _ = _balanced(u, s, vh, rank, matrix.dtype, shape, transposed)
    total = float(matrix.double().square().sum())
    return factors, max(0.0, safe_ratio(total - float(s[:rank].square().sum()), total))


def _balanced(
    u: Tensor, s: Tensor, vh: Tensor, rank: int, dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> tuple[LowRank, float]:
    root = s[:rank].sqrt()
    up, down = (u[..., :rank] * root).to(dtype), (root[:, None] * vh[..., :rank, :]).to(dtype)
    energy = s.square()
    return LowRank(up, down, shape, transposed), safe_ratio(float(energy[rank:].sum()), float(energy.sum()))


def squared_norm(delta: Delta) -> Tensor:
    """The sum of squares of a change, float64; of factors through their Gram matrices."""
    if isinstance(delta, LowRank):
        up, down = delta.up.double(), delta.down.double()
        return ((up.mT @ up) * (down @ down.mT)).sum()
    pieces = torch.split(delta.value.reshape(-1), 1 << 20)
    return torch.stack([piece.double().square().sum() for piece in pieces]).sum()
