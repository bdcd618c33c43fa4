"""Decompositions: the leading directions of large matrices."""

from __future__ import annotations

import itertools

import pytest
import torch

from merging.maths import linalg
from merging.maths.linalg import fix_signs, krylov_svd


@pytest.mark.parametrize(("decay", "lost"), [(1.0, 1e-6), (0.3, 1e-6), (0.0, 0.01)])
def test_krylov_finds_leading_directions(decay: float, lost: float) -> None:
    """Nearly all of their energy, orthonormal, and the same in each run."""
    random = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(700, 600, generator=random), full_matrices=False)
    s = s * (1 + torch.arange(600)) ** -decay
    matrix = (u * s) @ vh
    left, values, right = krylov_svd(matrix, 24)
    assert left.shape == (700, 24) and right.shape == (24, 600)
    best = torch.linalg.svdvals(matrix.double())[:24]
    assert float(values.square().sum() / best.square().sum()) >= 1 - lost
    for vectors in (left.mT, right):
        torch.testing.assert_close(vectors @ vectors.mT, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-5)
    if decay:
        torch.testing.assert_close(values, best, rtol=1e-4, atol=0)
        error = matrix - left @ torch.diag(values) @ right
        torch.testing.assert_close(error.norm(), s[24:].norm().double(), rtol=1e-3, atol=0)
    assert torch.equal(krylov_svd(matrix, 24)[1], values)


@pytest.mark.parametrize("shape", [(5, 9, 6), (2, 3, 40, 70), (3, 90, 80), (1, 64, 2000), (7, 4)])
def test_a_batch_is_decomposed_as_its_matrices(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """To the same bits, also where it is more than one call takes."""
    monkeypatch.setattr(linalg, "_BATCHED", 150)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = linalg.decompose_each(matrices, 4)
    assert (u.shape[:-2], s.shape[-1]) == (shape[:-2], 4)
    for place in itertools.product(*map(range, shape[:-2])):
        wanted = linalg.decompose(matrices[place].double(), needed=4)
        assert all(torch.equal(one[place], other) for one, other in zip((u, s, vh), wanted, strict=True))


def test_signs_of_a_basis_of_nothing() -> None:
    """A space without a dimension has no largest entry."""
    assert fix_signs(torch.zeros(0, 3)).shape == (0, 3)
