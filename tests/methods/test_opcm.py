"""OPCM against its naive reference, on full matrices and on factors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import equal

import merging
from merging.maths.delta import LowRank
from merging.methods.opcm import project, sum_projected
from support import references
from support.changes import EXPERTS, F32, F64, PLACES, K, Q, changes, close, dense, written
from support.factors import growing_pairs, low
from support.references import flatten

modes = pytest.mark.parametrize("mode", ["block", "two_sided"])


def one_by_one(models: Any, alpha: float, mode: Any) -> Any:
    """The reference, in float64, where an expert is a matrix of its own."""
    split = [{name: value.double() for name, value in each.items() if name != EXPERTS} for each in models]
    for each, apart in zip(models, split, strict=True):
        apart |= {f"{EXPERTS}.{i}": expert.double() for i, expert in enumerate(each.get(EXPERTS, []))}
    out = references.opcm(split, [n for n, v in split[0].items() if v.dim() == 2 and "layers." in n], alpha, mode)
    own = [out.pop(name) for name in sorted(out) if name.startswith(EXPERTS)]
    return out | ({EXPERTS: torch.stack(own)} if own else {})


def check_opcm(adapters: Any, alpha: float, mode: str, within: float = 1e-5, models: Any = None, **options: Any) -> Any:
    got = merging.merge_deltas(adapters, method="opcm", alpha=alpha, mode=mode, **options)
    wanted = one_by_one(models or written(adapters), alpha, mode)
    assert got.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not close(got[name].dense().double(), value, within)] == []
    return got


@modes
@pytest.mark.parametrize("svd", ["gram", "thin"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_opcm(mode: str, svd: str, dtype: torch.dtype) -> None:
    models, within = changes(6, 8, dtype, PLACES), 1e-5 if dtype == F32 else 1e-9
    for alpha in (0.2, 0.5, 0.9):
        got = check_opcm(dense(models), alpha, mode, within, svd=svd)
    length = flatten(written([got]))[0].norm()
    assert float(length) == pytest.approx(float(flatten(models).norm(dim=1).mean()), rel=1e-6)
    for frozen in (models[0], models[3]):
        frozen[K], frozen[EXPERTS] = 0 * frozen[K], 0 * frozen[EXPERTS]
    check_opcm(dense(models), 0.5, mode, within, svd=svd)
    one = models[1]
    twice = merging.merge_deltas(dense([one, one]), method="opcm", mode=mode, svd=svd)
    factor = float((twice["patch.weight"].dense() / one["patch.weight"]).mean()) / 2
    for name, value in one.items():  # what is projected is not there twice
        times = 1 if "layers." in name and value.dim() > 1 else 2
        assert close(twice[name].dense(), times * factor * value, 1e-5)


@modes
@pytest.mark.parametrize("shape", [(6, 5), (40, 30), (30, 40)])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcm_of_factors(mode: str, shape: Any, transposed: bool) -> None:
    adapters = [
        {name: low(pair, transposed=transposed) for name in (Q, K)} for pair in growing_pairs(*shape, (2, 2, 2, 2))
    ]
    full = written(adapters)
    del adapters[0][Q]
    full[0][Q] = 0 * full[0][Q]
    for alpha in (0.2, 0.5, 0.9):
        got = check_opcm(adapters, alpha, mode, models=full)
        assert isinstance(got[K], LowRank) and got[K].rank <= 8
        check_opcm(dense(full), alpha, mode)


@modes
@pytest.mark.parametrize("svd", ["gram", "thin"])
def test_opcm_projection(mode: str, svd: str) -> None:
    for (rows, columns), condition in itertools.product([(20, 12), (12, 20), (12, 12)], [1e-1, 1e-4, 1e-8, 1e-12]):
        new, u, v = torch.randn(3, 20, 20, dtype=F64, generator=torch.Generator().manual_seed(rows))
        sigma = condition ** torch.linspace(0, 1, 12, dtype=F64)
        old = torch.linalg.qr(u[:rows, :12])[0] * sigma @ torch.linalg.qr(v[:columns, :12])[0].T
        new = new[:rows, :columns]
        for alpha in (0.0, 0.5, 0.9, 1.0):
            rest = project(new, old, alpha, mode=mode, null=1e-14, svd=svd)
            assert float((rest * old).sum().abs()) < 1e-10 * float(new.norm() * old.norm())
            assert float(project(old, old, alpha, mode=mode, null=1e-14, svd=svd).norm()) < 1e-10 * float(old.norm())
            check_opcm(dense([{Q: old}, {Q: new}]), alpha, mode, svd=svd) if alpha < 1 else None
        assert equal(sum_projected([0 * old, new], 0.5, mode, 1e-14, svd), new)
