"""DELLA: shares by rank, rescaling, and draws that depend on places alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, equal

import merging
from support import references
from support.changes import EXPERTS, F32, F64, PLACES, Q, changes, close, dense, merged
from support.on_models import TABLE
from support.references import flatten, ties

WIDE: Any = {
    Q: (3000, 40),
    "layers.0.bias": (60_000,),
    "patch.weight": (2000, 3, 4, 5),
    EXPERTS: (4, 800, 40),
    TABLE: (3000, 24),
}


def as_rows(name: str, value: Tensor) -> Tensor:
    """What is ranked together: rows of matrices, a vector, a filter."""
    if value.dim() == 1:
        return value[None]
    return value.flatten(1) if name == "patch.weight" else value.flatten(0, -2)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("options", [{}, {"density": 0.4, "epsilon": 0.3}, {"density": 0.5, "epsilon": 0.0}], ids=str)
def test_della_keeps_its_shares(name: str, options: Any) -> None:
    """By rank, within five standard deviations; and neighbours in a row or rank are no more alike than others."""
    (model,) = changes(1, 7, F64, {name: WIDE[name]})
    density, epsilon = options.get("density", 0.7), options.get("epsilon", 0.15)
    x = as_rows(name, model[name])
    columns = torch.arange(x.shape[1], dtype=F64)[None] + 1
    by_rank = references.della_probabilities(columns, density, epsilon)[0]
    got = as_rows(name, merging.merge_deltas(dense([model]), method="della", rescale="none", **options)[name].dense())
    assert equal(got, torch.where(got != 0, x, 0))
    kept = (got != 0).double().gather(1, x.abs().argsort(dim=1, stable=True))  # columns are ranks
    count = kept.shape[0]
    if count == 1:  # a vector: ranks by the hundred
        kept, by_rank, count = kept.view(-1, 100).T, by_rank.view(-1, 100).mean(1), 100
    noise = (kept - by_rank) / (by_rank * (1 - by_rank)).sqrt()
    assert float(noise.mean(0).abs().max()) < 5 / count**0.5
    assert float(noise.mean(1).abs().max()) < 5.5 / kept.shape[1] ** 0.5
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    for lag in (1, 2, 7):
        assert abs(float((noise[:, lag:] * noise[:, :-lag]).mean())) < 5 / noise.numel() ** 0.5
        assert abs(float((noise[lag:] * noise[:-lag]).mean())) < 5 / noise.numel() ** 0.5


def test_della_ranks_equal_magnitudes_by_position() -> None:
    model = {Q: torch.ones(4000, 11) * (-1) ** torch.arange(11)}
    kept = merging.merge_deltas(dense([model]), method="della", rescale="none")[Q].dense() != 0
    wanted = references.della_probabilities(torch.ones(1, 11), 0.7, 0.15)[0]
    assert wanted.tolist() == pytest.approx([0.55 + 0.03 * i for i in range(11)])
    assert float((kept.double().mean(0) - wanted).abs().max()) < 5 * 0.5 / 4000**0.5


def test_della_never_drops_what_is_sure_to_be_kept() -> None:
    models = changes(1, 5, F32, {Q: (4000, 5)})
    value = models[0][Q]
    got = merged(models, "della", density=0.6, epsilon=0.4).view(4000, 5)
    largest = value.abs().argmax(1, keepdim=True)
    assert equal(got.gather(1, largest), value.gather(1, largest))
    assert 0.5 < float((got != 0).double().mean()) < 0.7


def test_della_rescales() -> None:
    shapes = {**PLACES, "one.weight": (30, 1)}
    models, keys = changes(3, 2, F64, shapes), "abc"
    options: Any = {"keys": keys, "density": (0.7, 0.5, 0.8), "epsilon": (0.15, 0.4, 0.0), "seed": 3}
    for i, (density, epsilon) in enumerate(zip(options["density"], options["epsilon"], strict=True)):
        alone: Any = {"keys": keys[i], "density": density, "epsilon": epsilon, "seed": 3}
        none, inverse, l1 = (
            merging.merge_deltas(dense(models[i : i + 1]), method="della", rescale=rescale, **alone)
            for rescale in ("none", "inverse", "l1")
        )
        for name, value in models[i].items():
            thin = none[name].dense()
            assert equal(thin != 0, inverse[name].dense() != 0) and equal(thin != 0, l1[name].dense() != 0)
            if thin.any():
                assert close(l1[name].dense(), thin * value.abs().sum() / thin.abs().sum(), 1e-12)
                assert float(l1[name].dense().abs().sum()) == pytest.approx(float(value.abs().sum()), rel=1e-12)
            if value.numel() == 1 or name == "one.weight":  # no ranks among one entry
                assert float(inverse[name].dense().abs().sum()) <= float(thin.abs().sum()) / (density - epsilon) + 1e-12
                continue
            p = references.della_probabilities(as_rows(name, value), density, epsilon).view(value.shape)
            assert close(inverse[name].dense(), torch.where(thin != 0, value / p, 0), 1e-12)
    parts = [
        merged(models[i : i + 1], "della", keys=keys[i], density=density, epsilon=epsilon, seed=3)
        for i, (density, epsilon) in enumerate(zip(options["density"], options["epsilon"], strict=True))
    ]
    assert close(merged(models, "della", **options), sum(parts), 1e-12)
    before_ties = {key: value for key, value in options.items() if key != "density"}
    before_ties |= {"della.density": options["density"], "ties.density": 0.4}
    assert close(merged(models, "della+ties", **before_ties), ties(torch.stack(parts), 0.4), 1e-12)


def test_della_draws_for_places() -> None:
    models = changes(3, 4, F32, PLACES)
    got = merged(models, "della", keys="abc", seed=7)
    assert equal(merged(models, "della", keys="abc", seed=7), got)
    assert equal(merged([dict(reversed(each.items())) for each in models], "della", keys="abc", seed=7), got)
    assert close(merged(models[::-1], "della", keys="cba", seed=7), got)
    assert not close(merged(models[::-1], "della", keys="abc", seed=7), got, 0.01)
    for other in ({"keys": "abd", "seed": 7}, {"keys": "abc", "seed": 8}):
        assert not close(merged(models, "della", **other), got, 0.01)
    assert equal(merged(models, "della", keys="abc"), merged(models, "della", keys="abc", seed=0))


def test_della_keeps_the_expectation() -> None:
    (model,) = changes(1, 3, F64, {Q: (6, 9), "layers.0.bias": (17,)})
    x, runs = flatten([model])[0], 600
    mean_of = sum(merged([model], "della", seed=seed) for seed in range(runs)) / runs
    p = torch.cat([references.della_probabilities(as_rows(n, model[n]), 0.7, 0.15).flatten() for n in sorted(model)])
    z = (mean_of - x) / (x.abs() * ((1 - p) / p / runs).sqrt())
    assert float(z.abs().max()) < 4.5 and 0.5 < float(z.square().mean()) < 1.6
