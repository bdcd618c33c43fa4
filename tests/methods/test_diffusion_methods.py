"""Clamp, train difference and cosine: the methods of diffusion users, against their released code's formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merging
from merging.errors import OptionError
from support import references
from support.changes import EXPERTS, F32, F64, PLACES, changes, close, merged
from support.on_models import doubles, dtypes, flat, weights_merged, within


@dtypes
@pytest.mark.parametrize("stiffness", [0.0, 0.4, 1.0])
def test_clamp(dtype: torch.dtype, stiffness: float) -> None:
    models = changes(4, 1, dtype, PLACES)
    wanted = flat(lambda x: references.clamped(0.6 * x.sum(0), x, stiffness))(doubles(models))
    got = merged(models, "clamp", scale=0.6, stiffness=stiffness)
    assert got.dtype == dtype and close(got.double(), wanted, within(dtype))


def test_clamp_of_weights() -> None:
    """Beyond the second of two checkpoints, without a base: no weight leaves the range of both."""
    tuned = changes(2, 1, F64, PLACES)
    low, high = torch.stack([references.flatten([each])[0] for each in tuned]).aminmax(dim=0)
    got, beyond = (weights_merged(tuned, method, t=1.5) for method in ("clamp+slerp", "slerp"))
    assert torch.equal(got, beyond.clamp(low, high)) and not torch.equal(got, beyond)


@dtypes
def test_train_difference(dtype: torch.dtype) -> None:
    models = changes(2, 1, dtype, PLACES)
    wanted = flat(lambda x: references.train_difference(x, 0.7))(doubles(models))
    assert close(merged(models, "train_difference", scale=0.7).double(), wanted, within(dtype))


def test_train_difference_adds_nothing_that_is_there() -> None:
    one, two = changes(2, 1, F64, PLACES)
    zero = {name: torch.zeros_like(value) for name, value in one.items()}
    assert close(merged([one, one], "train_difference"), merged([one], "task_arithmetic"), 1e-12)
    assert close(merged([zero, two], "train_difference"), 0.9 * merged([two], "task_arithmetic"), 1e-12)


@pytest.mark.parametrize("variant", ["a", "b"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_cosine(variant: str, alpha: float) -> None:
    models = changes(2, 1, F64, PLACES)
    for name, value in models[1].items():
        models[1][name] = models[0][name] + 0.7 * value

    def wanted(name: str) -> torch.Tensor:
        x = torch.stack([each[name] for each in models])
        if name == EXPERTS:
            return torch.stack([references.cosine_merge(each, alpha, variant) for each in x.transpose(0, 1)])
        return references.cosine_merge(x, alpha, variant)

    got: Any = merging.merge_state_dicts(models, method="cosine", alpha=alpha, variant=variant)
    assert all(close(got[name], wanted(name), 1e-9) for name in PLACES)
    if alpha == 1:
        assert all(close(got[name], models[1][name], 1e-12) for name in PLACES)


@pytest.mark.parametrize(
    ("method", "count", "message"),
    [("cosine", 3, "merges 2 models, and 3 were given"), ("train_difference", 1, "merges 2 models, and 1 was given")],
)
def test_they_merge_two_models(method: str, count: int, message: str) -> None:
    models = changes(count, 1, F32)
    base = {name: torch.zeros_like(value) for name, value in models[0].items()}
    with pytest.raises(OptionError, match=message):
        merging.merge_state_dicts(models, base=base, method=method)
