"""Singular values and overlaps of what models change, against flat float64 matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import subspace_angles

from merging.geometry import compare, spectra
from merging.geometry.spectrum import directions, overlaps, singular_values, spectrum_of
from merging.maths.delta import Dense, LowRank
from support import tiny
from support.adapter_pool import F64, SHAPES, Factors

# -- spectra -----------------------------------------------------------------------------------------------------------


def test_singular_values(pool: tuple[list[Path], list[Factors]]) -> None:
    paths, made = pool
    for name, found in spectra(paths):
        for model, values in zip(made, found, strict=True):
            module = name.removesuffix(".weight")
            if module not in model:
                assert values is None
                continue
            assert values is not None
            up, down = model[module]
            wanted = torch.linalg.svdvals(up @ down)
            assert len(values) == min(len(down), *SHAPES[module])
            torch.testing.assert_close(values, wanted[: len(values)], rtol=0, atol=1e-12 * float(wanted[0] + 1))


def test_what_a_spectrum_tells() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    found = spectrum_of(values)
    entropy = -sum(share * math.log(share) for share in (3 / 6, 2 / 6, 1 / 6))
    assert found.largest == 3
    assert found.effective == pytest.approx(math.exp(entropy))
    assert found.stable == pytest.approx(14 / 9)
    assert (found.energy90, found.energy99) == (2, 3)
    assert found.curve == pytest.approx([9 / 14, 13 / 14, 1, 1])
    flat_one = spectrum_of(torch.ones(5))
    assert (flat_one.effective, flat_one.stable, flat_one.energy90) == pytest.approx((5, 5, 5))
    assert spectrum_of(torch.zeros(4)) == spectrum_of(torch.zeros(0)) == spectrum_of(torch.zeros(2, 0))
    experts = spectrum_of(torch.stack([values, torch.tensor([1.0, 0, 0, 0]), torch.zeros(4)]))
    assert experts.stable == pytest.approx((14 / 9 + 1) / 2), "a matrix that did not change has no spectrum"


def test_full_changes_and_convolutions_are_decomposed_too() -> None:
    random = torch.Generator().manual_seed(0)
    for shape in ((30, 12), (12, 30), (8, 3, 3, 3)):
        value = torch.randn(shape, generator=random)
        found = singular_values(Dense(value))
        torch.testing.assert_close(found, torch.linalg.svdvals(value.double().flatten(1)), rtol=1e-7, atol=0)


def test_large_full_changes_are_decomposed_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.geometry.spectrum.SIDE", 8)
    base, tuned = tiny.checkpoint(tmp_path, 2, width=10)
    unasked, asked = (compare(tuned, base=base, full_spectra=full) for full in (False, True))
    assert [model.matrices for model in unasked.models] == [0, 0]
    assert unasked.overlaps is None
    assert any("full_spectra=True decomposes them too" in notice for notice in unasked.notices)
    assert [model.matrices for model in asked.models] == [4, 4]
    assert not asked.notices


# -- subspaces ---------------------------------------------------------------------------------------------------------


def test_overlaps_follow_principal_angles() -> None:
    """scipy's angles: the mean of their squared cosines."""
    random = torch.Generator().manual_seed(0)
    changes: list[Any] = [
        LowRank(
            torch.randn(20, r, generator=random, dtype=F64), torch.randn(r, 14, generator=random, dtype=F64), (20, 14)
        )
        for r in (3, 5, 9)
    ]
    changes += [Dense(torch.randn(20, 14, generator=random)), LowRank(torch.zeros(20, 2), torch.ones(2, 14), (20, 14))]
    most = 6
    bases = [directions(change, most) for change in changes]
    for side in (0, 1):
        got = overlaps([*(base[side] for base in bases), None])
        for i, one in enumerate(changes):
            for j, other in enumerate(changes):
                subspaces = []
                for change in (one, other):
                    u, s, vh = torch.linalg.svd(change.dense().double(), full_matrices=False)
                    kept = min(most, int((s > 1e-6 * s[0]).sum()))
                    subspaces.append((u if side == 0 else vh.mT)[:, :kept].numpy())
                if not all(subspace.shape[1] for subspace in subspaces):
                    assert math.isnan(got[i, j])
                    continue
                cosines_of_angles = torch.from_numpy(subspace_angles(*subspaces)).cos()
                assert float(got[i, j]) == pytest.approx(float(cosines_of_angles.square().mean()), abs=1e-9)
        assert bool(got[-1].isnan().all())


def test_overlaps_of_a_pool(pool: tuple[list[Path], list[Factors]]) -> None:
    """The mean over the tensors that two models both change; 1 with oneself, and chance as it is drawn."""
    paths, made = pool
    found = compare(paths, signs=None, directions=3).overlaps
    assert found and found.directions == 3
    for side, matrix in (("outputs", found.outputs), ("inputs", found.inputs)):
        for i, one in enumerate(made):
            for j, other in enumerate(made):
                each = [
                    overlaps([directions(LowRank(*m[name], SHAPES[name]), 3)[side == "inputs"] for m in (one, other)])
                    for name in SHAPES
                    if name in one and name in other
                ]
                wanted = [float(pair[0, 1]) for pair in each if not pair[0, 1].isnan()]
                if not wanted:
                    assert matrix[i][j] is None
                else:
                    assert matrix[i][j] == pytest.approx(sum(wanted) / len(wanted), abs=1e-9)
    assert found.chance_outputs == pytest.approx(3 / 26, rel=0.5)
    random = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(200, 5, generator=random, dtype=F64))[0].mT for _ in range(40)]
    drawn = overlaps(bases)[torch.triu(torch.ones(40, 40), 1).bool()].mean()
    assert float(drawn) == pytest.approx(5 / 200, rel=0.1)
