"""Orthogonal matching pursuit and nearest neighbors, against the plain formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from merging.maths.sparse_approximation import interpolate_neighbors, pursue_matches


class Blocks:
    """A dictionary in memory that is shown in blocks of a size."""

    def __init__(self, values: Tensor, size: int) -> None:
        self.values, self.size = values, size

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self.values), self.size):
            yield first, self.values[first : first + self.size].float()

    def select(self, numbers: Tensor) -> Tensor:
        return self.values[numbers]


def drawn(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_pursuit(vector: Tensor, atoms: Tensor, k: int) -> Tensor:
    """The sum of atoms, with a least-squares problem solved in each step."""
    left, chosen = vector, []
    for _ in range(k):
        products = (atoms @ left).abs()
        products[chosen] = -1
        chosen.append(int(products.argmax()))
        weights = torch.linalg.lstsq(atoms[chosen].T, vector[:, None]).solution[:, 0]
        left = vector - weights @ atoms[chosen]
    return vector - left


@pytest.mark.parametrize("size", [7, 100])
def test_pursuit_is_the_projection_on_the_best_atoms(size: int) -> None:
    atoms, vectors = drawn(40, 12, 0), drawn(5, 12, 1)
    found = pursue_matches(vectors, Blocks(atoms, size), 6)
    sums = torch.einsum("nk,nkw->nw", found.weights, atoms[found.numbers])
    wanted = torch.stack([plain_pursuit(vector, atoms, 6) for vector in vectors])
    torch.testing.assert_close(sums, wanted)
    torch.testing.assert_close(found.errors, (vectors - wanted).norm(dim=1) / vectors.norm(dim=1))
    assert all(len(set(each)) == 6 for each in found.numbers.tolist())


def test_pursuit_stops_where_nothing_is_left() -> None:
    atoms = drawn(20, 8, 2)
    vectors = torch.stack([2 * atoms[3] - atoms[5], torch.zeros(8, dtype=torch.float64), drawn(1, 8, 3)[0]])
    found = pursue_matches(vectors, Blocks(atoms, 20), 64)
    sums = torch.einsum("nk,nkw->nw", found.weights, atoms[found.numbers])
    torch.testing.assert_close(sums, vectors, rtol=0, atol=1e-5)
    assert found.weights[1].eq(0).all()


def test_pursuit_takes_repeated_atoms_once() -> None:
    atoms = drawn(3, 8, 4).repeat(4, 1)
    found = pursue_matches(drawn(2, 8, 5), Blocks(atoms, 5), 8)
    assert found.weights.isfinite().all()
    assert (found.weights.abs() > 1e-9).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("size", [7, 100])
def test_neighbors_are_weighted_by_their_inverse_distances(size: int) -> None:
    atoms, vectors = drawn(40, 12, 6), drawn(5, 12, 7)
    found = interpolate_neighbors(vectors, Blocks(atoms, size), 4)
    distances, nearest = torch.cdist(vectors, atoms).topk(4, largest=False)
    weights = distances.reciprocal() / distances.reciprocal().sum(1, keepdim=True)
    wanted = torch.einsum("nk,nkw->nw", weights, atoms[nearest])
    torch.testing.assert_close(torch.einsum("nk,nkw->nw", found.weights, atoms[found.numbers]), wanted)
    same = interpolate_neighbors(atoms[:2], Blocks(atoms, size), 4)
    torch.testing.assert_close(torch.einsum("nk,nkw->nw", same.weights, atoms[same.numbers]), atoms[:2])
