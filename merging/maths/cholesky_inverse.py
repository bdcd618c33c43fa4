"""Inverses of large symmetric positive definite matrices, in place, by blocks and products of matrices."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch
from merging.maths.products import row_products

__all__ = ["invert_definite"]

_BLOCK = 512
"""Rows of a block: enough for quick products, and few, as the blocks of the diagonal are left to LAPACK."""


def invert_definite(matrix: Tensor) -> bool:
    """Replace a symmetric positive definite matrix by its inverse; return whether it is positive definite.

    The steps are LAPACK's: a Cholesky factor ``L``, its inverse, and the product of that with its transpose. All but
    the blocks of the diagonal are inner products of rows, for which the upper triangle holds ``L^-T``. Only the lower
    triangle is read. Where this returns False, the matrix has lost its values.
    """
    size = len(matrix)
    blocks = [slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]
    if not _factorize(matrix, blocks):
        return False
    for at, rows in enumerate(blocks):
        own = matrix[rows, rows].mT
        for columns in blocks[:at]:
            between = slice(columns.start, rows.start)
            inner = row_products(matrix[columns, between], matrix[rows, between])
            matrix[columns, rows] = row_products(inner, own).neg_()
    for rows in blocks:
        found = row_products(matrix[: rows.stop, rows.start :], matrix[rows, rows.start :])
        matrix[rows, : rows.stop] = found.mT
    for rows in blocks:
        matrix[: rows.start, rows] = matrix[rows, : rows.start].mT
        own = matrix[rows, rows]
        own.copy_(own.tril() + own.tril(-1).mT)
    return True


def _factorize(matrix: Tensor, blocks: list[slice]) -> bool:
    """Put the Cholesky factor ``L`` below the blocks of the diagonal, and their ``L^-T`` in these blocks."""
    for at, rows in enumerate(blocks):
        factor, failed = torch.linalg.cholesky_ex(matrix[rows, rows])
        if bool(failed):
            return False
        one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, one, upper=False)
        matrix[rows, rows] = inverse.mT
        below = row_products(matrix[rows.stop :, rows], inverse)
        matrix[rows.stop :, rows] = below
        for others in blocks[at + 1 :]:
            first = others.start - rows.stop
            matrix[others.start :, others] -= row_products(below[first:], below[first : first + _BLOCK])
    return True
