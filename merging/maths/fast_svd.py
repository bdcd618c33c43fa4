"""Singular value decompositions in float32, for large matrices: checked, or left to float64.

Residuals and orthonormality are checked. Where a check fails, the functions return None, and the caller decomposes in
float64 (:mod:`merging.maths.linalg`). Seeds are fixed, so that the same matrix gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from merging.maths.block_lanczos import BLOCK, LanczosBasis, block_lanczos
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import ThinSvd, decompose, leading_svd, polar
from merging.maths.polar_factors import is_orthonormal, rational_polar
from merging.maths.products import multiply, multiply_symmetric

__all__ = [
    "LARGE",
    "SvdAccuracy",
    "fast_polar",
    "fast_svd",
    "leading_gram",
    "leading_triples",
    "polars",
    "suits_float32",
]

SvdAccuracy = Literal["exact", "fast"]
"""``exact``: decompositions in float64. ``fast``: in float32 where their checks hold."""

LARGE = 1024
"""Matrices with at most this many rows or columns are decomposed in float64, which is as quick there."""

_FLOOR = 2e-6
"""Smallest share of the largest singular value that float32 resolves: twice :data:`~merging.maths.linalg.CUT`."""

_LEAST_LEADING = 5e-3
"""Smallest share of the first of the leading singular values down to which all of them are exact in float32."""

_LEAST_OF_SIZE = 1e-4
"""Smallest share of the size of a matrix at which the directions that are left of it are exact in float32."""

_LANCZOS_SHARE = 6
"""Up to this part of the shorter side Lanczos is quicker than a Gram matrix (measured on one core)."""

_OUTSTANDING = 192
"""Lanczos vectors by which the few largest singular values are split off."""

_SMALL = 0.05
"""Share of the largest singular value that is left below which a float32 Gram matrix is too rough."""

_WINDOW = 128
"""Neighboring directions that are decomposed together once more."""


def suits_float32(matrix: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether a matrix of numbers of a type, by default its own, is in float32, and large enough to gain."""
    return (dtype or matrix.dtype) == torch.float32 and matrix.dim() == 2 and min(matrix.shape) > LARGE


def leading_triples(
    matrix: Tensor,
    most: int | None = None,
    *,
    svd: SvdAccuracy,
    dtype: torch.dtype | None = None,
    size: float = 0.0,
) -> ThinSvd:
    """Return the SVD of a matrix without its zero singular values, or the largest ``most`` values only.

    With ``fast`` it is float32 for large matrices whose checks hold. Otherwise it is float64, by
    :func:`~merging.maths.linalg.leading_svd`, which has the same arguments. ``dtype`` is the type of the data that the
    matrix was computed from, by default its own.
    """
    if svd == "fast" and suits_float32(matrix, dtype):
        found = _fast_triples(matrix.float(), most)
        if found is not None:
            least = (_FLOOR if most is None else _LEAST_LEADING) * float(found[1][0])
            if float(found[1][-1]) > max(least, _LEAST_OF_SIZE * size):
                return found
    return leading_svd(matrix, most, size)


def _fast_triples(matrix: Tensor, most: int | None) -> ThinSvd | None:
    """Return all singular triples of a float32 matrix, or the ``most`` leading ones, by the quickest way."""
    short = min(matrix.shape)
    if most is None or 2 * most > short:
        found = fast_svd(matrix)
        return None if found is None else (found[0][:, :most], found[1][:most], found[2][:most])
    found = block_lanczos(matrix, most) if most * _LANCZOS_SHARE <= short else None
    return leading_gram(matrix, most) if found is None else found


def polars(us: Sequence[Tensor], vhs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the polar factors of left and of right singular vectors of several matrices side by side.

    Both are float32 where some of the vectors are, and the checks hold, and otherwise float64.
    """
    joined = torch.cat([*us], 1), torch.cat([*vhs])
    if any(u.dtype == torch.float32 for u in us) and all(suits_float32(each, torch.float32) for each in joined):
        left = fast_polar(joined[0].float(), split=False)
        right = None if left is None else fast_polar(joined[1].float(), split=False)
        if left is not None and right is not None:
            return left, right
    return polar(joined[0]), polar(joined[1])


def fast_polar(matrix: Tensor, split: bool = True) -> Tensor | None:
    """Return the polar factor ``U V^T`` of a float32 matrix; None where float32 does not resolve all its directions.

    By a rational function, or by singular vectors where that does not hold. ``split`` is as in :func:`fast_svd`.
    """
    found = rational_polar(matrix, _FLOOR)
    if found is not None:
        return found
    triples = fast_svd(matrix, split)
    return None if triples is None else multiply(triples[0], triples[2])


def leading_gram(matrix: Tensor, needed: int) -> ThinSvd | None:
    """Return the ``needed`` leading singular triples of a float32 matrix by its Gram matrix in float32, or None.

    Eigenvectors of a rounded Gram matrix span the leading directions well, but are turned among each other. The matrix
    projected on a few more of them, decomposed in float64, turns them back.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.mT
    found = _gram_eigenvectors(short)
    if found is None:
        return None
    vectors = torch.linalg.qr(found[1][:, : needed + max(BLOCK, needed // 8)])[0]
    turn, values, others = decompose(multiply(vectors.mT, short).double(), needed=needed)
    left, s, right = multiply(vectors, turn.to(vectors)), values.to(vectors), others.to(vectors)
    return (left, s, right) if wide else (right.mT, s, left.mT)


def _gram_eigenvectors(short: Tensor, split: bool = True) -> tuple[Tensor, Tensor, int] | None:
    """Return a matrix ``[m, n]`` without its outstanding directions, its left singular vectors, and their number.

    The outstanding directions come first, the others in descending order. None for numbers that are not finite.
    """
    width = min(_OUTSTANDING, len(short) // 4)
    found = block_lanczos(short, width // 4, width) if split else None
    count = 0 if found is None else found[1].numel()
    rest = short if found is None or not count else short - multiply(found[0], multiply(found[0].mT, short))
    gram = multiply_symmetric(rest, rest.mT)
    if not bool(gram.isfinite().all()):
        return None
    if found is not None and count:  # these become the largest eigenvalues, so that they mix with no others
        largest = float(LanczosBasis.of(gram, 2).solve(1)[0])
        gram.addmm_(found[0], found[0].mT, alpha=4 * largest)
    vectors = torch.linalg.eigh(gram)[1].flip(1)
    if found is not None and count:
        vectors[:, :count] = found[0]
    return rest, vectors, count


def fast_svd(matrix: Tensor, split: bool = True, least: float = 0.0) -> ThinSvd | None:
    """Return the SVD of a float32 matrix by its Gram matrix in float32, in descending order; None if that is too rough.

    A float32 Gram matrix is exact to ``eps s_1^2``, so that directions with singular values ``s`` come out orthogonal
    up to ``eps (s_1 / s)^2``. Therefore the few outstanding directions are split off first, which makes ``s_1`` small.
    Small singular values are found on the matrix projected on their space, in float64, which does not square them.

    Args:
        matrix: the matrix ``[m, n]``.
        split: whether there may be outstanding directions.
        least: the share of the largest singular value up to which directions are left out. With 0 there must be none
            that float32 does not resolve.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.mT
    found = _gram_eigenvectors(short, split)
    if found is None:
        return None
    rest, u, gone = found
    vh = multiply(u.mT, rest)
    vh[:gone] = multiply(u[:, :gone].mT, short)
    s = torch.linalg.vector_norm(vh, dim=1)
    large = gone + int((s[gone:] >= _SMALL * s[gone : gone + 1]).sum())
    if len(s) - large > len(s) // 2:
        return None
    for start, stop in ((0, gone), *_windows(gone, large), (large, len(s))):
        if start < stop:
            part = slice(start, stop)
            turn, sizes, others = decompose(vh[part].double())
            u[:, part], s[part], vh[part] = u[:, part] @ turn.to(u), sizes.to(s), (sizes[:, None] * others).to(vh)
    resolved = int((s > max(least, _FLOOR) * s.max()).sum())
    if resolved < len(s) and least < _FLOOR:
        return None
    vh = vh[:resolved] / s[:resolved, None]
    vh[large:] -= (vh[large:] @ vh[:large].mT) @ vh[:large]
    vh[large:] /= torch.linalg.vector_norm(vh[large:], dim=1, keepdim=True)
    order = s[:resolved].argsort(descending=True, stable=True)
    u, s, vh = u[:, order], s[order], vh[order]
    if not (is_orthonormal(u.mT) and is_orthonormal(vh)):
        return None
    return (u, s, vh) if wide else (vh.mT, s, u.mT)


def _windows(start: int, stop: int) -> list[tuple[int, int]]:
    """Return windows of neighboring directions, twice, so that every two neighbors are in one of them.

    A rounded Gram matrix turns neighbors among each other, as their eigenvalues hardly differ.
    """
    half = _WINDOW // 2
    found = []
    for first in (start, start - half):
        found += [(max(start, each), min(stop, each + _WINDOW)) for each in range(first, stop, _WINDOW)]
    return found
