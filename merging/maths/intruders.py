"""Intruder dimensions: leading singular vectors of a changed matrix that resemble no singular vector of the base.

Shuttleworth et al. 2024 (arXiv 2410.21228): ``u_j`` of ``W = W_0 + D`` is an intruder if ``max_i |cos(u_j, u0_i)|``
is below a threshold, for the ``k`` leading ``u_j`` and all left singular vectors ``u0_i`` of ``W_0``. LoRA makes
them, full fine-tuning hardly does, and they go with forgetting.

In the base's singular bases ``W`` is ``diag(S_0) + (U_0^T B)(A V_0)``: its leading left vectors are found there by a
block Krylov method, and their coordinates are the cosines. So a base is decomposed once, and each adapter costs
milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from merging.display.tables import Displayed
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import ThinSvd, decompose
from merging.maths.sums import safe_ratio

__all__ = ["Intruders", "find_intruders", "intruders", "left_vectors"]

_PRECISION = 1e-12
"""The residual of a converged eigenvector, relative to the largest eigenvalue."""

_SMALL, _LARGEST = 512, 1200
"""The largest side of a matrix that is decomposed directly, and the most dimensions of a Krylov space."""

_MORE = 6
"""Extra leading vectors of the base with which the search begins."""


@dataclass(frozen=True, slots=True, repr=False)
class Intruders(Displayed):
    """The intruder dimensions of one matrix.

    Attributes:
        similarity: The largest cosine of each leading left singular vector to any of the base's.
        outside: The length of each vector's part outside the space of the base's vectors. (A tall matrix has only as
            many as columns.) It bounds the cosine to any vector that completes them.
        values: The singular values of the vectors.
        which: The positions of the intruders among the vectors, from 0.
        share: The intruders' share of the matrix's energy (squared Frobenius norm).
    """

    similarity: tuple[float, ...]
    outside: tuple[float, ...]
    values: tuple[float, ...]
    which: tuple[int, ...]
    share: float

    @property
    def first(self) -> int | None:
        """The rank of the first intruder among the singular values, from 1."""
        return self.which[0] + 1 if self.which else None

    def below(self, threshold: float) -> int:
        """Return the number of leading vectors whose similarity is below a threshold."""
        return sum(cosine < threshold for cosine, value in zip(self.similarity, self.values, strict=True) if value)


def intruders(base: ThinSvd, delta: Delta, weight: Tensor, *, k: int = 10, threshold: float = 0.5) -> Intruders:
    """Find the intruders among the ``k`` leading left singular vectors of ``weight + delta``.

    The result is exact to about 1e-10 where the singular values are distinct. Equal singular values have any vectors
    that span their space.

    Args:
        base: The thin SVD of ``weight``, float64.
        delta: The change, ``[out, in]``: factors that are not transposed, or a full matrix.
        weight: The base's matrix, ``[out, in]`` float64.
        k: The number of leading vectors.
        threshold: The largest cosine of an intruder.
    """
    u0, s0, _ = base
    if isinstance(delta, LowRank):
        changed = _InBasis.of(base, delta)
        vectors, values = left_vectors(changed, k)
        coordinates, energy = vectors[: len(s0)], changed.energy()
        outside = torch.linalg.vector_norm(vectors[len(s0) :], dim=0)
    else:
        whole = _DenseMatrix(weight + delta.dense().double(), u0)
        vectors, values = left_vectors(whole, k)
        coordinates, energy = u0.mT @ vectors, float(whole.matrix.square().sum())
        outside = torch.linalg.vector_norm(vectors - u0 @ coordinates, dim=0)
    similarity = coordinates.abs().amax(0).clamp(max=1)
    new = (similarity < threshold) & (values > 0)
    share = safe_ratio(float(values[new].square().sum()), energy)
    return Intruders(
        tuple(similarity.tolist()),
        tuple(outside.tolist()),
        tuple(values.tolist()),
        tuple(new.nonzero()[:, 0].tolist()),
        share,
    )


def find_intruders(weight: Tensor, changed: Tensor, *, k: int = 10, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the intruders of a changed matrix as factors ``up [out, n]`` and ``down [n, in]``, float64.

    Their product is the part of the changed matrix in the directions of its intruders, ``sum_j s_j u_j v_j^T``.

    Args:
        weight: The base's matrix, ``[out, in]`` float64.
        changed: The changed matrix, of the same shape and type.
        k: The number of leading left singular vectors among which intruders are looked for.
        threshold: The largest cosine of an intruder to any left singular vector of the base.
    """
    u0, _, _ = decompose(weight)
    vectors, values = left_vectors(_DenseMatrix(changed, u0), min(k, *changed.shape))
    similarity = (u0.mT @ vectors).abs().amax(0)
    up = vectors[:, (similarity < threshold) & (values > 0)]
    return up, up.mT @ changed


@dataclass(slots=True)
class _InBasis:
    """``diag(s) + left @ right`` in the singular bases of the base, extended by the factors' parts outside of them."""

    s: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, base: ThinSvd, delta: LowRank) -> _InBasis:
        """Return the factors in coordinates. Their parts outside a thin basis get new coordinates, at most the rank."""
        u0, s0, v0h = base
        return cls(s0, _coordinates(u0, delta.up.double()), _coordinates(v0h.mT, delta.down.double().mT).mT)

    @property
    def size(self) -> int:
        return len(self.left)

    def adjoint(self, x: Tensor) -> Tensor:
        return self._diagonal(x, self.right.shape[1]) + self.right.mT @ (self.left.mT @ x)

    def forward(self, x: Tensor) -> Tensor:
        return self._diagonal(x, self.size) + self.left @ (self.right @ x)

    def _diagonal(self, x: Tensor, size: int) -> Tensor:
        out = x.new_zeros(size, x.shape[1])
        out[: len(self.s)] = self.s[:, None] * x[: len(self.s)]
        return out

    def begin(self, k: int) -> Tensor:
        """Return vectors whose span nearly holds the leading ones: the base's, and the images of the factors."""
        reached = self._diagonal(self.right.mT, self.size)
        return torch.cat([torch.eye(self.size, min(k, len(self.s))).to(self.s), self.left, reached], 1)

    def dense(self) -> Tensor:
        return self.forward(torch.eye(self.right.shape[1]).to(self.s))

    def energy(self) -> float:
        """Return the sum of squares."""
        size = len(self.s)
        mixed = (self.left[:size] * self.right[:, :size].mT).sum(1)
        product = (self.left.mT @ self.left) * (self.right @ self.right.mT)
        return float(self.s.square().sum() + 2 * (self.s * mixed).sum() + product.sum())


def _coordinates(basis: Tensor, factor: Tensor) -> Tensor:
    """Return a factor ``[d, r]`` in an orthonormal basis ``[d, k]`` and in a basis of the rest: ``[k + r', r]``."""
    inside = basis.mT @ factor
    if basis.shape[0] == basis.shape[1]:
        return inside
    rest = torch.linalg.qr(factor - basis @ inside, mode="r")[1]
    return torch.cat([inside, rest])


@dataclass(slots=True)
class _DenseMatrix:
    """A dense matrix, and the base's left vectors as the start of the search."""

    matrix: Tensor
    basis: Tensor

    @property
    def size(self) -> int:
        return len(self.matrix)

    def adjoint(self, x: Tensor) -> Tensor:
        return self.matrix.mT @ x

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def begin(self, k: int) -> Tensor:
        return self.basis[:, :k]

    def dense(self) -> Tensor:
        return self.matrix


def left_vectors(matrix: _InBasis | _DenseMatrix, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` leading left singular vectors ``[size, k]`` and singular values ``[k]`` of an operator."""
    if matrix.size > _SMALL:
        found = _krylov(lambda x: matrix.forward(matrix.adjoint(x)), matrix.begin(k + _MORE), k)
        if found is not None:
            return found
    u, s, _ = torch.linalg.svd(matrix.dense(), full_matrices=False)
    return u[:, :k], s[:k]


def _krylov(apply: Callable[[Tensor], Tensor], start: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Return the ``k`` leading eigenvectors of a positive operator, and the roots of their eigenvalues.

    A block Krylov space from ``start``, fully orthogonalized, grows until its Ritz vectors are eigenvectors. The result
    is None if it grows too large. Additional random vectors find eigenvectors that are orthogonal to ``start``.
    """
    random = torch.Generator().manual_seed(0)
    extra = torch.randn(len(start), 2, generator=random, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([start, extra.to(start)], 1))[0]
    images = apply(basis)
    newest = images
    while True:
        squares, turned = torch.linalg.eigh(basis.mT @ images)
        top = turned[:, -k:]
        residual = torch.linalg.vector_norm(images @ top - basis @ (top * squares[-k:]), dim=0)
        if float(residual.max()) <= _PRECISION * float(squares[-1]):
            return (basis @ top).flip(1), squares[-k:].flip(0).clamp(min=0).sqrt()
        if basis.shape[1] + newest.shape[1] > min(_LARGEST, len(start)):
            return None
        for _ in range(2):
            newest = newest - basis @ (basis.mT @ newest)
        newest = torch.linalg.qr(newest)[0]
        # A vector that is reduced to rounding errors is orthogonalized once more.
        newest = torch.linalg.qr(newest - basis @ (basis.mT @ newest))[0]
        basis = torch.cat([basis, newest], 1)
        newest = apply(newest)
        images = torch.cat([images, newest], 1)
