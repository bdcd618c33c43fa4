"""Leading singular directions of large matrices by block Lanczos iteration, in the type of the matrix."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import ThinSvd
from merging.maths.products import multiply, row_products

__all__ = ["BLOCK", "LanczosBasis", "block_lanczos"]

_RESIDUAL = 1e-4
"""Largest residual of a Lanczos triple, as a share of its singular value."""

BLOCK = 32
"""Lanczos vectors in a block: enough for quick products, and few, so that the polynomials are of a high degree."""

_WIDEST = 0.5
"""Share of the shorter side up to which Lanczos bases grow."""

_FIRST_CHECK = 3.25
"""Part of the singular triples needed after which a basis is checked first: the bases of most fine-tunes suffice."""

_HOPELESS = 0.05
"""Largest residual with which it is worth to widen a basis that has grown to seven tenths of its limit."""

_REMAINDER = 0.02
"""Share of a block outside a basis below which it is made orthogonal to the basis a second time."""


def block_lanczos(matrix: Tensor, needed: int, widest: int | None = None) -> ThinSvd | None:
    """Return the ``needed`` leading singular triples of a matrix, or None if they do not converge.

    Golub-Kahan-Lanczos bidiagonalization by blocks, with full reorthogonalization on both sides (Golub, Luk and
    Overton 1981), in the type of the matrix; the small problems are float64. The basis grows until the residual of
    each triple is at most 1e-4 of its singular value, and vectors from another seed find no larger direction outside:
    of values that more than 32 directions share, a Krylov space has only 32. With ``widest`` it stops at that many
    columns, and returns the leading triples that converged up to there, which may be none.
    """
    limit = int(_WIDEST * min(matrix.shape)) if widest is None else widest
    blocks = limit // BLOCK
    if needed + BLOCK > blocks * BLOCK:
        return None
    basis = LanczosBasis(matrix, blocks)
    check = blocks * BLOCK if widest else max(int(_FIRST_CHECK * needed), needed + 4 * BLOCK)
    while True:
        basis.extend()
        if basis.width >= check or basis.full:
            values, left, right, residuals = basis.solve(needed)
            converged = int((residuals <= _RESIDUAL * values).long().cumprod(0).sum())
            if converged == needed or (widest and basis.full):
                found = basis.lift(left[:, :converged], values[:converged], right[:, :converged])
                return found if widest or _are_largest(found, matrix) else None
            if basis.width > 0.7 * basis.most and float((residuals / values).max()) > _HOPELESS:
                return None
            check = int(1.06 * basis.width)
        if basis.full or not basis.finite:
            return None


def _are_largest(found: ThinSvd, matrix: Tensor) -> bool:
    """Return whether no direction outside of singular triples is found that is larger than the last of them."""
    u, s, vh = found
    rest = LanczosBasis.of(matrix - multiply(u * s, vh), 2, seed=1)
    return float(rest.solve(1)[0]) <= float(s[-1]) * (1 + _RESIDUAL)


class LanczosBasis:
    """Orthonormal bases of a Krylov space, and the matrix in them.

    The vectors are the rows of ``left [width, m]`` and ``right [width, n]``, which products take fastest.
    """

    def __init__(self, matrix: Tensor, blocks: int, seed: int = 0) -> None:
        rows, columns = matrix.shape
        self.matrix, self.width, self.most = matrix, 0, blocks * BLOCK
        self._left = matrix.new_empty(self.most, rows)
        self._right = matrix.new_empty(self.most, columns)
        self._inside = torch.zeros(self.most, self.most, dtype=torch.float64, device=matrix.device)
        probe = torch.randn(columns, BLOCK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self._next = torch.linalg.qr(multiply(matrix, probe.to(matrix)))[0].mT
        self._norms = self._next  # of the next block, in terms of the last one

    @classmethod
    def of(cls, matrix: Tensor, blocks: int, seed: int = 0) -> LanczosBasis:
        """Return the bases of a matrix after some blocks."""
        basis = cls(matrix, blocks, seed)
        for _ in range(blocks):
            basis.extend()
        return basis

    @property
    def full(self) -> bool:
        """Whether there is no room for another block."""
        return self.width >= self.most

    @property
    def finite(self) -> bool:
        """Whether all numbers so far are finite."""
        return bool(self._norms.isfinite().all())

    def extend(self) -> None:
        """Take the next block of left vectors into the basis, and the right vectors that belong to it."""
        start, end = self.width, self.width + BLOCK
        self._left[start:end] = self._next
        right, inside = _orthogonalize(multiply(self._left[start:end], self.matrix), self._right[:start])
        self._right[start:end] = right
        self._inside[start:end, :end] = inside.mT
        self.width = end
        self._next, coordinates = _orthogonalize(multiply(self.matrix, right.mT).mT, self._left[:end])
        self._norms = coordinates[end:].double()

    def solve(self, needed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return leading singular values, both sides in coordinates of the bases, and the norms of their residuals."""
        inside = self._inside[: self.width, : self.width]
        squares, vectors = torch.linalg.eigh(inside @ inside.mT)
        values = squares.flip(0)[:needed].clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        left = vectors.flip(1)[:, :needed]
        right = inside.mT @ left / values
        return values, left, right, torch.linalg.vector_norm(self._norms @ right[-BLOCK:], dim=0)

    def lift(self, left: Tensor, values: Tensor, right: Tensor) -> ThinSvd:
        """Return singular triples from their coordinates."""
        ups, downs = self._left[: self.width], self._right[: self.width]
        return multiply(left.mT.to(ups), ups).mT, values.to(ups), multiply(right.mT.to(downs), downs)


def _orthogonalize(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows that span a block outside a basis, and the block's coordinates in both as columns."""
    inside = row_products(basis, block)
    outside, norms = torch.linalg.qr((block - multiply(inside.mT, basis)).mT)
    if float(norms.diagonal().abs().min()) < _REMAINDER * float(torch.linalg.matrix_norm(block)):
        again = row_products(basis, outside.mT)  # rounding errors count in small remainders
        outside, rest = torch.linalg.qr(outside - multiply(again.mT, basis).mT)
        inside, norms = inside + again @ norms, rest @ norms
    return outside.mT, torch.cat([inside, norms])
