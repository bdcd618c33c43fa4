"""Polar factors in float32 by products and a few inverses of a Gram matrix, without its eigenvectors."""

from __future__ import annotations

from merging.maths.block_lanczos import BLOCK, LanczosBasis
from merging.maths.cholesky_inverse import invert_definite
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import decompose
from merging.maths.products import multiply, multiply_symmetric, row_products

__all__ = ["is_orthonormal", "rational_polar"]

_LEAST = 1e-2
"""Share of the largest singular value from which the rational function holds; smaller ones are found apart."""

_SHIFTS = (2.84297770e-05, 4.88966688e-04, 2.75743850e-01, 1.02093697e-02)
_LINKS = (0.0, 0.0, 2.82144452e-03, 2.72608144e-03)
_WEIGHTS = (7.37052e-03, 1.587346e-02, 3.802488e-01, 1.6212759e-01)
_CONSTANT, _SLOPE = 6.1143927e-01, -9.249521e-02
"""x^-1/2 on [1e-4, 1] to 2.7e-4: constant + slope x + sum_j weight_j y_j, with y_j = 1 / (x + shift_j + link_j y_j-1).

Fitted by a search for the smallest largest error. An inverse of an inverse has more poles than either, at no cost."""

_NARROW = 8
"""Part of the directions that may be smaller than ``_LEAST``."""

_RESIDUAL = 1e-2
"""Largest residual of a small direction, as a share of its inverse square."""

_MARGIN = 1.02
"""Factor on the estimate of the largest singular value, which is a lower bound."""

_ROUNDING = 3e-3
"""Largest estimate of the share of a polar factor that rounding changes, which is a tenth of it."""

_SLACK = 1e-3
"""Largest deviation of factors from orthonormality, on random vectors."""


def rational_polar(matrix: Tensor, floor: float) -> Tensor | None:
    """Return the polar factor ``U V^T`` of a float32 matrix ``[m, n]`` by a rational function, or None.

    The factor is ``f(X X^T) X`` for the shorter side, with a rational f that is nearly the inverse root. It takes four
    inverses of matrices of that side, where the eigenvectors cost as much as eight. The few directions below a
    hundredth of the largest singular value are found by Lanczos vectors of the first inverse, and decomposed in
    float64. None where these are more than an eighth, where one is below the share ``floor`` of the largest, or where
    the checks fail.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.mT
    gram = multiply_symmetric(short, short.mT)
    if not bool(gram.isfinite().all()):
        return None
    largest = float(LanczosBasis.of(gram, 3).solve(1)[0]) * _MARGIN**2
    if not largest > torch.finfo(gram.dtype).tiny:
        return None
    gram /= largest
    found = _inverse_root(gram)
    if found is None:
        return None
    root, small = found
    factor = multiply(root, short)
    factor /= largest**0.5
    if not _replace_small(factor, short, small, floor * largest**0.5):
        return None
    if not is_orthonormal(factor):
        return None
    return factor if wide else factor.mT


def _inverse_root(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return nearly the inverse root of a Gram matrix of norm 1, and orthonormal rows of its small directions."""
    root = gram * _SLOPE
    root.diagonal().add_(_CONSTANT)
    small = previous = None
    for shift, link, weight in zip(_SHIFTS, _LINKS, _WEIGHTS, strict=True):
        shifted = gram.clone() if previous is None else torch.add(gram, previous, alpha=link)
        shifted.diagonal().add_(shift)
        if not invert_definite(shifted):
            return None
        previous = shifted
        root.add_(previous, alpha=weight)
        if small is None:
            small = _small_directions(previous, shift)
            if small is None:
                return None
            sizes = row_products(multiply(small, previous), small).diagonal()
            rest = torch.linalg.matrix_norm(previous - multiply(small.mT * sizes, small))
            if float(rest) * float(gram.diagonal().mean()) * torch.finfo(gram.dtype).eps > _ROUNDING:
                return None
    assert small is not None
    return root, small


def _small_directions(inverse: Tensor, shift: float) -> Tensor | None:
    """Return orthonormal rows of the directions with singular values below the least, from the shifted inverse.

    None if they are too many.
    """
    blocks = len(inverse) // (2 * BLOCK)
    basis = LanczosBasis(inverse, blocks)
    check = min(3 * BLOCK, basis.most)
    while not basis.full and basis.finite:
        basis.extend()
        if basis.width < check:
            continue
        values, left, right, residuals = basis.solve(basis.width)
        count = int((values > 1 / (_LEAST**2 + shift)).sum())
        if count > len(inverse) // _NARROW:
            return None
        if count < basis.width // 2 and bool((residuals[:count] <= _RESIDUAL * values[:count]).all()):
            found = basis.lift(left[:, :count], values[:count], right[:, :count])[0]
            small: Tensor = torch.linalg.qr(found)[0].mT
            return small
        check = min(int(1.3 * basis.width), basis.most)
    return None


def _replace_small(factor: Tensor, short: Tensor, small: Tensor, floor: float) -> bool:
    """Put exact directions into a polar factor for its small ones; return whether all are above a floor."""
    if not len(small):
        return True
    factor -= multiply(small.mT, multiply(small, factor))
    images = multiply(small, short)
    for _ in range(2):  # parts of larger directions would count more than the smallest directions
        images = images - multiply(row_products(images, factor), factor)
    left, values, right = decompose(images.double(), "thin")
    factor += multiply(small.mT, (left @ right).to(factor))
    return float(values[-1]) > floor


def is_orthonormal(rows: Tensor) -> bool:
    """Return whether the rows of a matrix are orthonormal, as far as a few random vectors show."""
    probe = torch.randn(4, len(rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(rows)
    error = (probe @ rows) @ rows.mT - probe  # few rows on the left: quicker than few columns on the right
    return bool(torch.linalg.vector_norm(error) <= _SLACK * torch.linalg.vector_norm(probe))
