"""TIES: thresholds, votes and tied elections, in memory and from files."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, equal

from support import references
from support.changes import EXACT, F64, by_tensor, changes, close, merged, written
from support.on_models import cancelling, coarse, trained, weighings
from support.references import flatten
from support.tiny import identical


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0, (0.2, 1.0, 0.5)])
@pytest.mark.parametrize("weights", [None, EXACT, (-1.0, -1.0, 0.5), (0.25, 0.0, 0.25)])
@pytest.mark.parametrize("kind", [list, coarse, cancelling])
def test_ties(density: Any, weights: Any, kind: Any) -> None:
    models, seen = kind(changes(3, 2)), []
    for vote, normalize, zero in itertools.product(["plain", "weighted"], [True, False], ["majority", "plus"]):
        options: Any = {"vote": vote, "zero": zero, "normalize": normalize, "density": density}
        options |= {} if weights is None else {"weights": weights}
        seen.append(references.ties(flatten(models), **options))
        assert equal(merged(models, "ties", **options), seen[-1])
        alone = by_tensor(models, lambda part, options=options: references.ties(flatten(part), **options))
        assert equal(merged(models, "ties", scope="tensor", **options), alone)
    assert kind is not cancelling or weights is not None or not equal(seen[0], seen[1])
    options = {"weights": (0.7, 1.3, -0.4), "scale": 0.3, "density": density}
    assert close(merged(models, "ties", **options), references.ties(flatten(models), **options))


@pytest.mark.parametrize("weight", [0.3, 0.7])
def test_equal_votes_cancel_out(weight: float) -> None:
    """w x and w (-x) add up to 0, not to what rounding leaves."""
    models: Any = [changes(1)[0], {name: -value for name, value in changes(1)[0].items()}]
    options: Any = {"density": 1.0, "vote": "weighted", "weights": (weight, weight)}
    assert close(merged(models, "ties", **options), references.ties(flatten(models), **options))


@weighings
def test_ties_from_files_and_of_trained_adapters(weights: Any, files: Any) -> None:
    wanted = files.plus(references.ties(flatten(files.changes), (0.2, 0.1, 0.6), **weights))
    for threads in (1, 3):
        assert identical(files.merge("ties", threads=threads, density=(0.2, 0.1, 0.6), **weights), wanted)
    real = trained()[:3]
    for density, adapters in itertools.product([0.2, 1.0], [real, written(real)]):
        wanted = references.ties(flatten(written(real)), density, **weights)
        assert equal(merged(adapters, "ties", density=density, **weights), wanted)


def test_ties_ranks_doubles_as_doubles() -> None:
    values = 1 + torch.randperm(1000, generator=torch.Generator().manual_seed(0)) * torch.tensor(1e-13, dtype=F64)
    wanted = torch.where(values >= values.sort().values[700], values, 0)
    assert equal(merged([{"a": values}], "ties", density=0.3), wanted)


@pytest.mark.parametrize("densities", [(0.5, 0.5, 0.5), (0.3, 1.0, 0.0)])
def test_ties_that_keeps_norms(densities: tuple[float, ...]) -> None:
    """What is left of each tensor has the L1 norm of the whole; a density of 0 leaves nothing of a model."""

    def trimmed(value: Tensor, density: float) -> Tensor:
        kept = references.ties(value.flatten()[None], density or 1.0, normalize=False).view(value.shape)
        return kept * (value.abs().sum() / kept.abs().sum()) if density else torch.zeros_like(value)

    models = changes(3, 2, F64)
    kept = [{n: trimmed(v, share) for n, v in each.items()} for each, share in zip(models, densities, strict=True)]
    options: Any = {"scope": "tensor", "density": densities, "keep_norm": True}
    for vote, zero in (("plain", "plus"), ("weighted", "majority")):
        got = merged(models, "ties", vote=vote, zero=zero, **options)
        wanted = by_tensor(kept, lambda part, how=(vote, zero): references.ties(flatten(part), 1.0, None, 1.0, *how))
        assert close(got, wanted, 1e-12)
