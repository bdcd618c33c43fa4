"""Vectors as sums of a few vectors of a dictionary: orthogonal matching pursuit, and nearest neighbors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["Dictionary", "SparseSums", "interpolate_neighbors", "pursue_matches"]

_EXACT = 1e-6
"""The share of a vector's norm below which a residual counts as zero."""


class Dictionary(Protocol):
    """Vectors that may be too many for the memory."""

    def blocks(self) -> Iterable[tuple[int, Tensor]]:
        """Yield all vectors in blocks ``[n, width]`` in float32, each with the number of its first vector."""

    def select(self, numbers: Tensor) -> Tensor:
        """Return the vectors of these numbers, ``[n, width]`` in float64."""


@dataclass(frozen=True, slots=True)
class SparseSums:
    """Sums of vectors of a dictionary.

    Attributes:
        numbers: the numbers of the vectors, ``[vectors, k]``.
        weights: what each is multiplied by, ``[vectors, k]`` in float64; 0 where fewer are needed.
        errors: the norm of what is left of each vector, as a share of its own norm.
    """

    numbers: Tensor
    weights: Tensor
    errors: Tensor


def pursue_matches(vectors: Tensor, dictionary: Dictionary, k: int) -> SparseSums:
    """Approximate vectors by orthogonal matching pursuit.

    Each step adds the vector of the dictionary with the largest inner product with what is left, and projects again.
    The vectors are not normalized first: as in the authors' own program, long ones are preferred.

    Paper: Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit,
    arXiv 2506.06607.

    Args:
        vectors: ``[vectors, width]`` in float64.
        dictionary: the vectors to sum.
        k: the most vectors of each sum.
    """
    count, width = vectors.shape
    k = min(k, width)
    left, norms = vectors.clone(), vectors.norm(dim=1)
    basis = vectors.new_zeros(count, k, width)
    factors = torch.eye(k, dtype=vectors.dtype, device=vectors.device).repeat(count, 1, 1)
    parts = vectors.new_zeros(count, k)
    numbers = torch.zeros(count, k, dtype=torch.long, device=vectors.device)
    working = norms > 0
    for step in range(k):
        if not bool(working.any()):
            break
        numbers[:, step] = _largest_match(left, dictionary, numbers[:, :step])
        atoms = dictionary.select(numbers[:, step])
        rest = atoms
        for _ in range(2):  # twice is enough to be orthogonal to working precision
            rest = rest - torch.einsum("nkw,nk->nw", basis, torch.einsum("nkw,nw->nk", basis, rest))
        length = rest.norm(dim=1)
        working &= length > _EXACT * atoms.norm(dim=1)
        direction = torch.where(working[:, None], rest / length.clamp_min(1e-300)[:, None], 0.0)
        projections = torch.einsum("nkw,nw->nk", basis, atoms)
        factors[:, step] = torch.where(working[:, None], projections, factors[:, step])
        factors[:, step, step] = torch.where(working, length, 1.0)
        parts[:, step] = (direction * vectors).sum(1)
        basis[:, step] = direction
        left = left - parts[:, step, None] * direction
        working &= left.norm(dim=1) > _EXACT * norms
    weights = torch.linalg.solve_triangular(factors.mT, parts[..., None], upper=True)[..., 0]
    return SparseSums(numbers, weights, _share(left, norms))


def _largest_match(left: Tensor, dictionary: Dictionary, taken: Tensor) -> Tensor:
    """Return the number of the vector with the largest inner product, among those not taken."""
    narrow = left.float()
    best = torch.full((len(left),), -1.0, device=left.device)
    found = torch.zeros(len(left), dtype=torch.long, device=left.device)
    for first, block in dictionary.blocks():
        products = (narrow @ block.mT).abs_()
        inside = (taken >= first) & (taken < first + len(block))
        rows, columns = inside.nonzero(as_tuple=True)
        products[rows, taken[rows, columns] - first] = -1.0
        value, place = products.max(1)
        better = value > best
        best, found = torch.where(better, value, best), torch.where(better, place + first, found)
    return found


def interpolate_neighbors(vectors: Tensor, dictionary: Dictionary, k: int) -> SparseSums:
    """Approximate vectors by the means of their nearest vectors, weighted by the inverses of the distances.

    Args:
        vectors: ``[vectors, width]`` in float64.
        dictionary: the vectors to average.
        k: the number of neighbors.
    """
    narrow, best, found = vectors.float(), vectors.new_zeros(len(vectors), 0).float(), None
    for first, block in dictionary.blocks():
        distances = block.square().sum(1) - 2 * (narrow @ block.mT)
        places = torch.arange(first, first + len(block), device=vectors.device).expand(len(vectors), -1)
        best = torch.cat([best, distances], 1)
        found = places if found is None else torch.cat([found, places], 1)
        best, order = best.topk(min(k, best.shape[1]), largest=False)
        found = found.gather(1, order)
    assert found is not None
    atoms = dictionary.select(found.reshape(-1)).view(*found.shape, -1)
    weights = (atoms - vectors[:, None]).norm(dim=2).clamp_min(1e-12).reciprocal()
    weights = weights / weights.sum(1, keepdim=True)
    left = vectors - torch.einsum("nk,nkw->nw", weights, atoms)
    return SparseSums(found, weights, _share(left, vectors.norm(dim=1)))


def _share(left: Tensor, norms: Tensor) -> Tensor:
    share: Tensor = left.norm(dim=1) / norms.clamp_min(1e-300)
    return share
