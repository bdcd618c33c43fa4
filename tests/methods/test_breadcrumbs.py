"""Breadcrumbs: exact counts, by tensor and by model."""

from __future__ import annotations

import pytest
import torch
from torch import equal

import merging
from support import references
from support.changes import F32, F64, PLACES, Q, changes, close, dense, merged
from support.on_models import flat
from support.references import flatten, ties


@pytest.mark.parametrize("density", [0.9, 0.31, 1.0, 0.001])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.25])
def test_breadcrumbs(density: float, gamma: float) -> None:
    """Counts are exact, by tensor; the method inside sees what is left."""
    for dtype in (F32, F64):
        models, options = changes(3, 2, dtype, PLACES), {"density": density, "gamma": gamma}
        thin = [
            {n: references.breadcrumbs(v.flatten(), density, gamma).view(v.shape) for n, v in m.items()} for m in models
        ]
        got = merging.merge_deltas(dense(models[:1]), method="breadcrumbs", **options)
        for name, value in models[0].items():
            assert equal(got[name].dense(), thin[0][name])
            assert int((got[name].dense() != 0).sum()) == max(1, int(density * value.numel()))
        assert close(merged(models, "breadcrumbs", **options), flatten(thin).sum(0))
        before_ties = {"breadcrumbs.density": density, "gamma": gamma, "ties.density": 0.4}
        assert close(merged(models, "breadcrumbs+ties", **before_ties), ties(flatten(thin), 0.4))


def test_breadcrumbs_by_model() -> None:
    models, densities, gammas = changes(3, 2, F64, PLACES), (0.9, 0.2, 0.5), (0.0, 0.1, 0.01)
    thin = [
        flat(lambda x, d=d, g=g: references.breadcrumbs(x[0], d, g))([m])
        for m, d, g in zip(models, densities, gammas, strict=True)
    ]
    assert close(merged(models, "breadcrumbs", density=densities, gamma=gammas), torch.stack(thin).sum(0), 1e-12)
    default = [flat(lambda x: references.breadcrumbs(x[0], 0.9, 0.01))([m]) for m in models]
    assert close(merged(models, "breadcrumbs"), torch.stack(default).sum(0), 1e-12)


def test_breadcrumbs_keeps_what_equals_a_threshold() -> None:
    x = torch.tensor([1, -1, 1, 2, -2, 3, 3, -4, 4, 5], dtype=F32)
    for density, gamma, kept in (
        (0.5, 0.0, [3, 4]),  # 5 4 4 3 3
        (0.6, 0.0, [2, 3, 4]),  # 5 4 4 3 3 2, and the other 2
        (0.4, 0.1, [3, 4]),
        (0.4, 0.2, [2, 3, 4]),  # 4 3 3 2: the other 4 as well, and the other 2
        (0.1, 0.3, [3]),
        (0.9, 0.5, [1, 2, 3, 4]),  # only one of the largest can go
    ):
        got = merged([{Q: x}], "breadcrumbs", density=density, gamma=gamma)
        assert equal(got, references.breadcrumbs(x, density, gamma))
        wanted = [magnitude in (kept if gamma else [*kept, 5]) for magnitude in x.abs().tolist()]
        assert (got != 0).tolist() == wanted
    coarse = [{n: (8 * v).bfloat16().float() for n, v in each.items()} for each in changes(1, 2, F32, PLACES)]
    wanted = flat(lambda x: references.breadcrumbs(x[0], 0.6, 0.1))(coarse)
    assert equal(merged(coarse, "breadcrumbs", density=0.6, gamma=0.1), wanted)
    assert not merged([{Q: torch.zeros(5, 4)}], "breadcrumbs").any()


def test_breadcrumbs_that_keeps_norms() -> None:
    """What is left of each tensor has the L1 norm of the whole; a density of 0 leaves nothing of a model."""
    densities, kept = (0.6, 1.0, 0.0), []
    for each, density in zip(changes(3, 2, F64, PLACES), densities, strict=True):
        kept.append({})
        for name, value in each.items():
            left = references.breadcrumbs(value.flatten(), density or 1.0, 0.1).view(value.shape)
            kept[-1][name] = left * (value.abs().sum() / left.abs().sum() if density else 0.0)
    options = {"density": densities, "gamma": 0.1, "keep_norm": True}
    assert close(merged(changes(3, 2, F64, PLACES), "breadcrumbs", **options), flatten(kept).sum(0), 1e-12)
