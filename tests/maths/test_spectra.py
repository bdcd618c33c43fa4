"""Singular values of changes, and the ranks chosen from them, against torch's float64 SVD."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from merging.maths.delta import Dense, LowRank
from merging.maths.spectra import RankLimits, SingularValues, decompose_change, fit_ranks


def decaying(rows: int, columns: int, power: float, seed: int = 0) -> Tensor:
    """A matrix with the singular values ``1 / k ** power``."""
    random = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, min(rows, columns), generator=random, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    values = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -power
    return (left * values) @ right.mT


@pytest.mark.parametrize("power", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_randomised_within_its_stated_error(power: float) -> None:
    """The energy that the best factors keep in addition is below the estimate, and the kept energy is exact."""
    matrix = decaying(300, 400, power).float()
    found = decompose_change(Dense(matrix), 16, shape=(300, 400))
    values = torch.linalg.svdvals(matrix.double())
    best = float(values[:16].square().sum())
    kept = found.spectrum.energy_within(16)
    assert found.spectrum.excess > 0
    assert kept - 1e-6 * best <= best <= kept + found.spectrum.excess + 1e-6 * best
    lost = float((matrix.double() - found.factors.dense().double()).square().sum())
    assert lost == pytest.approx(float(values.square().sum()) - kept, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (300, 280)])
def test_exact_is_the_svd(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape, 0.7)
    found = decompose_change(Dense(matrix), exact=True, shape=shape)
    values = torch.linalg.svdvals(matrix)
    assert torch.allclose(torch.tensor(found.spectrum.values, dtype=torch.float64), values, rtol=1e-9)
    assert found.spectrum.complete and not found.spectrum.excess
    assert torch.allclose(found.factors.dense(), matrix, atol=1e-12)
    for rank in (1, 7):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        leading = found.factors.up[:, :rank] @ found.factors.down[:rank]
        assert torch.allclose(leading, best, atol=1e-9)


def test_factors_are_decomposed_through_their_product() -> None:
    """Values split evenly, and a batch of experts has one list of values: the root of the sum of the squares."""
    random = torch.Generator().manual_seed(1)
    up, down = torch.randn(3, 8, 4, generator=random), torch.randn(3, 4, 6, generator=random)
    found = decompose_change(LowRank(up, down, (3, 8, 6)))
    values = torch.linalg.svdvals((up @ down).double())[:, :4]
    assert torch.tensor(found.spectrum.values).double() == pytest.approx(values.square().sum(0).sqrt(), rel=1e-6)
    assert torch.allclose(found.factors.dense(), up @ down, atol=1e-5)
    assert torch.allclose(found.factors.up.norm(dim=-2), found.factors.down.norm(dim=-1), atol=1e-5)


VALUES = SingularValues((4.0, 2.0, 1.0, 0.5, 0.0), 16 + 4 + 1 + 0.25, 5)


@pytest.mark.parametrize(
    ("limits", "rank"),
    [
        (RankLimits(), 4),
        (RankLimits(most=3), 3),
        (RankLimits(energy=0.9), 2),
        (RankLimits(energy=1.0), 4),
        (RankLimits(energy=0.9, most=1), 1),
        (RankLimits(sv_ratio=4), 3),
        (RankLimits(sv_ratio=3.9), 2),
        (RankLimits(error=0.24), 3),
        (RankLimits(error=0.0), 4),
        (RankLimits(energy=0.99, sv_ratio=2), 2),
    ],
)
def test_conditions(limits: RankLimits, rank: int) -> None:
    assert limits.rank(VALUES) == rank


def test_more_values_are_asked_for_where_they_decide() -> None:
    some = SingularValues((4.0, 2.0), 21.25, 5)
    assert RankLimits(energy=0.99).rank(some) is None
    assert RankLimits(energy=0.9).rank(some) == 2
    assert RankLimits(most=2).rank(some) == 2
    assert RankLimits(sv_ratio=1.5).rank(some) == 1
    assert RankLimits().rank(SingularValues((), 0.0, 5)) == 0


def test_no_other_ranks_within_the_budget_keep_more() -> None:
    """By trying all ranks of three tensors with equal costs."""
    random = torch.Generator().manual_seed(2)
    spectra = {}
    for name in "abc":
        values = torch.rand(4, generator=random).sort(descending=True).values.tolist()
        spectra[name] = SingularValues(tuple(values), sum(value**2 for value in values), 4)
    for budget in range(10, 130, 10):
        ranks = fit_ranks(spectra, dict.fromkeys("abc", 10), budget, RankLimits())
        kept = sum(each.energy_within(ranks[name]) for name, each in spectra.items())
        tried = [
            sum(each.energy_within(rank) for each, rank in zip(spectra.values(), some, strict=True))
            for some in product(range(5), repeat=3)
            if 10 * sum(some) <= budget
        ]
        assert kept == pytest.approx(max(tried))


def test_dear_directions_need_more_energy() -> None:
    spectra = {"dear": SingularValues((3.0, 2.0), 13.0, 2), "cheap": SingularValues((2.0, 1.0), 5.0, 2)}
    assert fit_ranks(spectra, {"dear": 100, "cheap": 10}, 120, RankLimits()) == {"dear": 1, "cheap": 2}
    assert fit_ranks(spectra, {"dear": 100, "cheap": 10}, 99, RankLimits()) == {"dear": 0, "cheap": 2}
    assert fit_ranks(spectra, {"dear": 1, "cheap": 1}, 99, RankLimits(most=1)) == {"dear": 1, "cheap": 1}
