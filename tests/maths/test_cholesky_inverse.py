"""Inverses of positive definite matrices, by blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merging.maths import cholesky_inverse
from merging.maths.cholesky_inverse import invert_definite


def definite(size: int, condition: float) -> Tensor:
    """A symmetric matrix with eigenvalues from 1 down to a part of it, float64."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    return basis * torch.logspace(0, -condition, size, dtype=torch.float64) @ basis.mT


@pytest.mark.parametrize("size", [1, 15, 16, 50, 64])
def test_inverses_are_exact_and_symmetric(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(cholesky_inverse, "_BLOCK", 16)
    exact = definite(size, 4)
    found = exact.tril()  # the upper triangle is not read
    assert invert_definite(found)
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found @ exact, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)


def test_float32_is_as_exact_as_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky_inverse, "_BLOCK", 16)
    exact = definite(200, 4)
    found = exact.float()
    lapack = torch.cholesky_inverse(torch.linalg.cholesky(found))
    wanted = torch.linalg.inv(found.double())
    assert invert_definite(found)
    assert float((found - wanted).norm()) < 4 * float((lapack - wanted).norm())


@pytest.mark.parametrize("place", [0, 20, 49])
def test_others_are_refused(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(cholesky_inverse, "_BLOCK", 16)
    value = torch.eye(50)
    value[place, place] = -1.0
    assert not invert_definite(value)
    value[place, place] = float("nan")
    assert not invert_definite(value)
