"""Decompositions in float32: their errors against float64, and what is left to float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import merging
from merging.maths import fast_svd
from merging.maths.block_lanczos import block_lanczos
from merging.maths.fast_svd import leading_triples, polars
from merging.maths.linalg import leading_svd, polar
from merging.methods import chain
from support.tiny import fine_tune, identical, load, model, save

SHARES = {
    "flat": lambda q: torch.ones_like(q),
    "fine-tune": lambda q: (1 + 80 * q) ** -0.6,
    "geometric": lambda q: 10 ** (-1.2 * q),
    "clustered": lambda q: 1 - 0.2 * torch.floor(4 * q) / 4,
}
SHAPES = [(140, 140), (140, 200), (200, 140)]
WIDE = [pytest.param(SHAPES[0], marks=pytest.mark.exhaustive), *SHAPES[1:]]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take small matrices for large ones."""
    monkeypatch.setattr(fast_svd, "LARGE", 64)


def matrix(spectrum: str, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A float32 matrix with the given singular values; of the flat kind, an exactly orthogonal one and noise."""
    random = torch.Generator().manual_seed(seed)
    short = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, short, generator=random, dtype=torch.float64))[0] for side in shape)
    values = SHARES[spectrum](torch.arange(short, dtype=torch.float64) / short)
    if spectrum == "flat":
        values = values + 0.5 * torch.rand(short, generator=random, dtype=torch.float64).sort(descending=True).values
    return (u * values @ v.mT).float()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("spectrum", SHARES)
def test_errors_of_all_directions(large: None, spectrum: str, shape: tuple[int, int]) -> None:
    """Values, polar factor, and factors that are orthonormal."""
    value = matrix(spectrum, shape)
    u, s, vh = leading_triples(value, svd="fast")
    exact = leading_svd(value)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s.double(), exact[1], rtol=1e-3, atol=1e-6)
    assert apart(u * s @ vh, value) < 1e-5
    assert apart(u @ vh, exact[0] @ exact[2]) < 2e-4
    for rows in (u.mT, vh):
        torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)), rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("spectrum", SHARES)
@pytest.mark.parametrize("most", [8, 36])
def test_errors_of_leading_directions(large: None, spectrum: str, shape: tuple[int, int], most: int) -> None:
    """By Lanczos vectors and by a Gram matrix. Inside a cluster any basis is as good, so only values are compared."""
    value = matrix(spectrum, shape)
    u, s, vh = leading_triples(value, most, svd="fast")
    exact = leading_svd(value, most)
    assert s.dtype == torch.float32 and s.shape == (most,)
    torch.testing.assert_close(s.double(), exact[1], rtol=1e-4, atol=0)
    assert apart(u.mT @ u, torch.eye(most)) < 1e-4
    if spectrum != "clustered":
        assert apart(u * s @ vh, exact[0] * exact[1] @ exact[2]) < 2e-4


def test_outstanding_directions_are_split_off(large: None) -> None:
    """Otherwise the squares of all others were lost in the rounding of theirs."""
    random = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(520, 520, generator=random, dtype=torch.float64))[0] for _ in range(2))
    values = torch.cat([torch.linspace(100, 60, 8), torch.linspace(1, 0.3, 512)]).double()
    found = fast_svd.fast_svd((u * values @ v.mT).float())
    assert found is not None and apart(found[0] @ found[2], u @ v.mT) < 2e-4


def test_both_ways_to_leading_directions(large: None) -> None:
    """Where Lanczos vectors converge, and where they are given up; either way the decomposition is one of both."""
    decaying, flat = matrix("fine-tune", (400, 360)), matrix("flat", (160, 160))
    assert block_lanczos(flat, 40) is None
    found = block_lanczos(decaying, 8)
    gram = fast_svd.leading_gram(decaying, 8)
    exact = leading_svd(decaying, 8)
    wanted = exact[0] * exact[1] @ exact[2]
    for each in (found, gram):
        assert each is not None and apart(each[0] * each[1] @ each[2], wanted) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_what_float32_cannot_hold_is_float64(large: None, shape: tuple[int, int]) -> None:
    """Zero matrices, ranks below the shorter side, small values, small matrices, and float64."""
    value = matrix("fine-tune", shape)
    zero, low = torch.zeros(shape), value[:, :20] @ value[:20]
    for each, most in ((zero, None), (low, None), (low, 30), (value.double(), None), (value[:60], None)):
        found, exact = leading_triples(each, most, svd="fast"), leading_svd(each, most)
        assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))
    u, s, vh = leading_triples(low, 8, svd="fast")
    exact = leading_svd(low, 8)
    assert apart(u * s @ vh, exact[0] * exact[1] @ exact[2]) < 1e-4
    assert leading_triples(value, svd="exact")[1].dtype == torch.float64


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(large: None, number: float) -> None:
    value = matrix("fine-tune", (160, 160))
    value[3, 4] = number
    for most in (None, 8, 60):
        with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            leading_triples(value, most, svd="fast")


def test_polar_factors_of_bases(large: None) -> None:
    """Side by side; bases that share a direction are left to float64."""
    bases = [torch.linalg.qr(matrix("flat", (200, 160), seed)[:, :40])[0] for seed in range(4)]
    values = torch.linspace(2, 1, 160)
    left, right = polars(bases, [each.mT for each in bases])
    exact = polar(torch.cat(bases, 1))
    assert left.dtype == right.dtype == torch.float32
    assert apart(left * values @ right, exact * values @ exact.mT) < 5e-4
    twice = [*bases[:3], bases[0]]
    assert torch.equal(polars(twice, [each.mT for each in twice])[0], polar(torch.cat(twice, 1)))


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "svd", "opcm", "star", "dc_merge"])
def test_merged_matrices_are_within_a_thousandth(large: None, name: str) -> None:
    """Of three fine-tunes that share some of their change."""
    common = matrix("fine-tune", (200, 170), 9)
    tuned = [{"a.weight": common + matrix("fine-tune", (200, 170), seed)} for seed in range(3)]
    base = {"a.weight": torch.zeros(200, 170)}
    exact, fast = (merging.merge_state_dicts(tuned, base=base, method=name, svd=svd) for svd in ("exact", "fast"))
    assert not torch.equal(fast["a.weight"], exact["a.weight"])
    assert apart(fast["a.weight"], exact["a.weight"]) < 1e-3


@pytest.mark.parametrize("name", ["tsv", "opcm"])
def test_threads_change_no_byte(large: None, tmp_path: Path, name: str) -> None:
    base = model(0, width=96)
    paths = [save(tmp_path / f"m{seed}", fine_tune(base, seed)) for seed in range(2)]
    for threads in (1, 2):
        merging.merge(
            paths,
            method=chain(name, {"svd": "fast"}),
            base=save(tmp_path / "base", base),
            output=tmp_path / f"out{threads}",
            threads=threads,
        )
    assert identical(load(tmp_path / "out1"), load(tmp_path / "out2"))
