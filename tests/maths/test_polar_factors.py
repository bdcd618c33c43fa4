"""Polar factors by a rational function: their errors against float64, and what they leave to others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merging.maths.linalg import polar
from merging.maths.polar_factors import rational_polar

FLOOR = 2e-6


def matrix(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A float32 matrix with the given singular values."""
    random = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, len(values), generator=random, dtype=torch.float64))[0] for side in shape)
    return (u * values @ v.mT).float()


@pytest.mark.parametrize("shape", [(200, 200), (200, 300), (300, 200)])
@pytest.mark.parametrize("least", [0.5, 1e-2, 1e-4], ids=["none below", "at the limit", "small directions"])
def test_polar_factors_are_near_those_of_float64(shape: tuple[int, int], least: float) -> None:
    """Of sizes for which the function is made, and of some far below, which are found apart."""
    values = torch.linspace(1, max(least, 1e-2), 200, dtype=torch.float64)
    if least < 1e-2:
        values[-6:] = torch.logspace(-3, -4, 6, dtype=torch.float64)
    value = matrix(values * 40, shape)
    found = rational_polar(value, FLOOR)
    assert found is not None
    errors = (found.double() - polar(value)) @ torch.linalg.svd(value.double(), full_matrices=False)[2].mT
    assert float(torch.linalg.vector_norm(errors, dim=0).max()) < 2e-2
    assert float(errors.norm()) < 3e-4 * 200**0.5


@pytest.mark.parametrize(
    "values",
    [
        torch.logspace(0, -4, 200),
        torch.cat([torch.ones(190), torch.zeros(10)]),
        torch.cat([torch.ones(3) * 1e4, torch.ones(197)]),
        torch.zeros(200),
        torch.full((200,), float("nan")),
    ],
    ids=["many small", "lower rank", "outstanding", "zero", "not a number"],
)
def test_others_are_left(values: Tensor) -> None:
    assert rational_polar(matrix(values.double(), (200, 200)), FLOOR) is None
