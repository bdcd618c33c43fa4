"""Decompositions through thin factors: a product of rank r never becomes its full matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.sums import safe_ratio

__all__ = [
    "CUT",
    "ThinSvd",
    "balance",
    "balance_terms",
    "compress_matrix",
    "decompose",
    "decompose_each",
    "factored_svd",
    "find_range",
    "fix_signs",
    "inner_product",
    "joint_core",
    "krylov_svd",
    "leading_svd",
    "output_basis",
    "polar",
    "residual_norm",
    "squared_norm",
    "sum_squares",
    "truncate",
]

CUT = 1e-6
"""The share of the largest singular value up to which others count as zero."""

_CONDITION = 1e-5
"""Smallest share of the largest singular value whose square is still exact enough in a float64 Gram matrix."""

_SMALL = 64
"""Matrices of at most this many rows or columns are decomposed by SVD, which is exact and quick there."""

_BATCHED = 1 << 20
"""Elements of small matrices that are decomposed in one call."""

_BLOCK = 1 << 16
"""Elements that are squared at a time, so that they stay in the processor's cache."""

ThinSvd = tuple[Tensor, Tensor, Tensor]
"""``U [m, k], S [k], Vh [k, n]``."""

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_KRYLOV_BLOCKS = 6
_PROBES, _RESIDUAL_ITERATIONS = 4, 6


def factored_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD ``U [out, k], S [k], Vh [k, in]`` of ``up @ down``, with ``k = min(out, r, in)``.

    Two thin QRs and one small core in float64: O((out + in) r^2) instead of O(out in min(out, in)).
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return q_up @ u, s, vh @ q_down.mT


def joint_core(deltas: Sequence[LowRank]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return orthonormal bases ``up [out, k]`` and ``down [k', in]`` that span all changes, and each change's core.

    A change is ``up @ core @ down`` with a core of ``[k, k']``, both at most the sum of the ranks. All is float64.
    """
    up, up_core = torch.linalg.qr(torch.cat([delta.up for delta in deltas], -1).double())
    down, down_core = torch.linalg.qr(torch.cat([delta.down for delta in deltas], -2).double().mT)
    ranks = [delta.rank for delta in deltas]
    ups, downs = up_core.split(ranks, -1), down_core.split(ranks, -1)
    return up, down.mT, [left @ right.mT for left, right in zip(ups, downs, strict=True)]


def decompose(matrix: Tensor, how: Literal["gram", "thin"] = "gram", needed: int | None = None) -> ThinSvd:
    """Return the SVD of a float64 matrix, or its ``needed`` largest values, in descending order.

    ``gram`` takes eigenvalues of the shorter side's Gram matrix, which is several times faster. It falls back to
    ``thin``, an SVD, where the smallest value needed is too small a share of the largest for its square to be exact.
    """
    needed = min(matrix.shape) if needed is None else min(needed, *matrix.shape)
    if how == "gram" and min(matrix.shape) > _SMALL:
        wide = matrix.shape[0] <= matrix.shape[1]
        short = matrix if wide else matrix.mT
        squares, vectors = torch.linalg.eigh(short @ short.mT)
        s = squares.flip(0)[:needed].clamp(min=0).sqrt()
        if float(s[-1]) > _CONDITION * float(s[0]):
            vectors = vectors.flip(1)[:, :needed]
            others = (vectors.mT @ short) / s[:, None]
            return (vectors, s, others) if wide else (others.mT, s, vectors.mT)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :needed], s[:needed], vh[:needed]


def decompose_each(matrices: Tensor, needed: int) -> ThinSvd:
    """Return the SVDs of a batch of matrices ``[..., out, in]`` in float64, in one call for many that are small."""
    rows, columns = matrices.shape[-2:]
    flat = matrices.reshape(-1, rows, columns)
    if min(rows, columns) > _SMALL:
        parts = [decompose(each.double(), needed=needed) for each in flat]
        u, s, vh = (torch.stack(each) for each in zip(*parts, strict=True))
    else:
        batches = torch.split(flat, max(1, _BATCHED // (rows * columns)))
        parts = [torch.linalg.svd(some.double(), full_matrices=False) for some in batches]
        u, s, vh = (torch.cat(each) for each in zip(*parts, strict=True))
        u, s, vh = u[..., :needed], s[..., :needed], vh[..., :needed, :]
    shape = matrices.shape[:-2]
    return u.reshape(*shape, *u.shape[1:]), s.reshape(*shape, s.shape[-1]), vh.reshape(*shape, *vh.shape[1:])


def krylov_svd(matrix: Tensor, needed: int) -> ThinSvd:
    """Return nearly the ``needed`` leading singular directions of a matrix, in float64, many times faster than all.

    Block Krylov iteration with a fixed seed (Musco and Musco 2015, arXiv 1504.05477): exact to rounding where singular
    values fall off, and within 1% of the energy where they hardly do.
    """
    width = min(needed + _OVERSAMPLING, *matrix.shape)
    probe = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = [torch.linalg.qr(matrix @ probe.to(matrix))[0]]
    for _ in range(_KRYLOV_BLOCKS - 1):
        blocks.append(torch.linalg.qr(matrix @ (matrix.mT @ blocks[-1]))[0])
    basis = torch.linalg.qr(torch.cat(blocks, 1))[0]
    u, s, vh = torch.linalg.svd((basis.mT @ matrix).double(), full_matrices=False)
    return basis.double() @ u[:, :needed], s[:needed], vh[:needed]


def leading_svd(matrix: Tensor, most: int | None = None, size: float = 0.0) -> ThinSvd:
    """Return the SVD of a matrix without its zero singular values, or the largest ``most`` values only; float64.

    A value is zero if it is at most the share ``CUT`` of the largest, or of ``size``.
    """
    u, s, vh = decompose(matrix.double(), needed=most)
    rank = int((s > CUT * s[:1].clamp(min=size)).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix whose singular values are 1, or 0 where ``matrix`` has 0."""
    u, _, vh = leading_svd(matrix)
    return u @ vh


def output_basis(changes: Sequence[Delta]) -> Tensor:
    """Return the left singular vectors ``[out, k]`` of all changes put together, without zero singular values; float64.

    There is at least one. The largest entry of each is positive, so that the basis depends on the changes alone.
    ``Dense`` changes are ``[out, in]``, and the basis is found from the Gram matrix of their outputs.
    """
    low = [change for change in changes if isinstance(change, LowRank)]
    if len(low) == len(changes):
        up, up_core = torch.linalg.qr(torch.cat([change.up for change in low], -1).double())
        cores = [
            core @ torch.linalg.qr(change.down.double().mT, mode="r")[1].mT
            for core, change in zip(up_core.split([change.rank for change in low], -1), low, strict=True)
        ]
        inside, s, _ = torch.linalg.svd(torch.cat(cores, -1), full_matrices=False)
        basis = up @ inside
    else:
        gram = sum(matrix @ matrix.mT for matrix in (change.dense().double() for change in changes))
        squares, vectors = torch.linalg.eigh(gram)
        basis, s = vectors.flip(1), squares.flip(0).clamp(min=0).sqrt()
    basis = basis[:, : max(1, int((s > CUT * s[:1]).sum()))]
    return fix_signs(basis)


def fix_signs(basis: Tensor) -> Tensor:
    """Return a basis ``[out, k]`` with the largest entry of each vector positive."""
    if not basis.numel():
        return basis
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    signed: Tensor = basis * torch.where(largest < 0, -1.0, 1.0)
    return signed


def balance(delta: LowRank) -> LowRank:
    """Return the change with the product's singular values split evenly between its factors, float64."""
    u, s, vh = factored_svd(delta.up, delta.down)
    return _balance((u, s, vh), s.shape[-1], torch.float64, delta.shape, delta.transposed)[0]


def balance_terms(delta: LowRank, dtype: torch.dtype) -> LowRank:
    """Return the change with the size of every rank-one term split evenly between its factors, in a type.

    Then no factor leaves the range of half precision before the product does.
    """
    up, down = delta.up.double(), delta.down.double()
    sizes = torch.linalg.vector_norm(down, dim=-1), torch.linalg.vector_norm(up, dim=-2)
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], 1.0).sqrt()
    up, down = up * ratio[..., None, :], down / ratio[..., :, None]
    return LowRank(up.to(dtype), down.to(dtype), delta.shape, delta.transposed)


def truncate(delta: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the best approximation of at most ``rank`` (Frobenius norm), and the share of energy it discards.

    The singular values are split evenly between the factors, which keeps both in the range of half precision.
    """
    if delta.rank <= rank:
        return delta, 0.0
    u, s, vh = factored_svd(delta.up, delta.down)
    return _balance((u, s, vh), rank, delta.up.dtype, delta.shape, delta.transposed)


def compress_matrix(
    matrix: Tensor, rank: int, shape: tuple[int, ...] | None = None, transposed: bool = False
) -> tuple[LowRank, float]:
    """Return factors of at most ``rank`` for a full ``matrix [out, in]``, and the share of energy they discard.

    A randomised range finder (Halko, Martinsson, Tropp 2011, algorithm 4.4) with a fixed seed. ``shape`` and
    ``transposed`` describe the base tensor that the factors belong to, as in
    :class:`~merging.maths.delta.LowRank`. Leading axes are batches (experts), each with factors of its own.
    """
    basis = find_range(matrix, rank)
    u, s, vh = factored_svd(basis, basis.mT @ matrix)
    shape = tuple(matrix.shape) if shape is None else shape
    factors, _ = _balance((u, s, vh), rank, matrix.dtype, shape, transposed)
    total = sum_squares(matrix)
    return factors, max(0.0, safe_ratio(total - float(s[..., :rank].square().sum()), total))


def find_range(matrix: Tensor, rank: int) -> Tensor:
    """Return orthonormal columns ``[..., out, k]`` that span about the ``rank`` leading left singular vectors.

    Subspace iteration from seeded random vectors (Halko, Martinsson, Tropp 2011, algorithm 4.4); ``k`` is a few more
    than ``rank``. Leading axes are batches.
    """
    width = min(rank + _OVERSAMPLING, *matrix.shape[-2:])
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[-1], width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ probe.to(matrix))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis)[0])[0]
    found: Tensor = basis
    return found


def residual_norm(matrix: Tensor, basis: Tensor, inner: Tensor) -> float:
    """Estimate the largest singular value of ``matrix - basis @ inner``, by power iterations on a few vectors.

    Of a batch it is the root of the sum of their squares.
    """
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(matrix.shape[-1], _PROBES, generator=generator, dtype=torch.float64).to(matrix)
    # Products with few rows on the left are many times faster than with few columns on the right.
    probe = torch.linalg.qr(probe)[0].mT.expand(*matrix.shape[:-2], -1, -1)
    norms = matrix.new_zeros(matrix.shape[:-2])
    for _ in range(_RESIDUAL_ITERATIONS):
        image = probe @ matrix.mT - (probe @ inner.mT) @ basis.mT
        norms = torch.linalg.matrix_norm(image, ord=2)
        probe = torch.linalg.qr((image @ matrix - (image @ basis) @ inner).mT)[0].mT
    return float(torch.linalg.vector_norm(norms))


def _balance(
    svd: ThinSvd, rank: int, dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> tuple[LowRank, float]:
    """Return factors of the largest singular values, split evenly, and the share of energy that is discarded."""
    u, s, vh = svd
    root = s[..., :rank].sqrt()
    up, down = (u[..., :rank] * root[..., None, :]).to(dtype), (root[..., None] * vh[..., :rank, :]).to(dtype)
    energy = s.square()
    return LowRank(up, down, shape, transposed), safe_ratio(float(energy[..., rank:].sum()), float(energy.sum()))


def inner_product(one: LowRank, other: LowRank) -> Tensor:
    """Return the inner product of two changes of one tensor, float64, through the products of their factors."""
    ups = one.up.double().mT @ other.up.double()
    downs = one.down.double() @ other.down.double().mT
    return (ups * downs).sum()


def squared_norm(delta: Delta) -> Tensor:
    """Return the sum of squares of a change, float64; of factors through their Gram matrices."""
    if isinstance(delta, LowRank):
        return inner_product(delta, delta)
    pieces = torch.split(delta.value.reshape(-1), 1 << 20)
    return torch.stack([piece.double().square().sum() for piece in pieces]).sum()


def sum_squares(matrix: Tensor) -> float:
    """Return the squared Frobenius norm of a matrix, or of a batch of them, summed in float64 by blocks of rows."""
    total = 0.0
    for each in matrix if matrix.dim() > 2 else (matrix,):
        blocks = each.split(max(1, _BLOCK // each.shape[1]))
        total += sum(float(block.double().square().sum()) for block in blocks)
    return total
