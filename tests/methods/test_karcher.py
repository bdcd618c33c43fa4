"""Means on the sphere: Karcher and its step from the chord, multislerp."""

from __future__ import annotations

import pytest
import torch

from merging.errors import InputError, OptionError
from support import references
from support.changes import F32, F64, Q, changes, close
from support.on_models import doubles, dtypes, flat, places, plus, weights_merged, within
from support.references import flatten


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
@dtypes
def test_means_on_the_sphere(method: str, dtype: torch.dtype) -> None:
    shapes = places(method)
    (base,), models = changes(1, 3, dtype, shapes), changes(3, 4, dtype, shapes)
    reference = getattr(references, method)
    for options in ({}, {"weights": (0.5, 1.0, 2.0)}):
        wanted = flat(lambda x, options=options: reference(x, **options))(doubles(models))
        assert close(weights_merged(models, method, space="weights", **options).double(), wanted, within(dtype))
        tuned = plus(base, models)
        on_base = weights_merged(tuned, method, base=base, space="changes", **options).double()
        assert close(on_base, flatten(doubles([base]))[0] + wanted, 1e-5 if dtype == F32 else 1e-12)
        near = flat(lambda x, options=options: reference(x, **options))(doubles(tuned))
        assert close(weights_merged(tuned, method, space="weights", **options).double(), near, within(dtype))


def test_the_mean_on_the_sphere_is_one() -> None:
    """The logarithms at the Karcher mean cancel out; two points meet half way, as slerp has them."""
    models = changes(2, 4, F64, {Q: (40, 16)})
    halfway = flat(references.nuslerp)([{Q: each[Q] / each[Q].norm()} for each in models])
    size = sum(float(each[Q].norm()) for each in models) / 2
    for method in ("karcher", "multislerp"):
        got = weights_merged(models, method, space="weights")
        assert close(got, size * halfway / halfway.norm(), 1e-9)
        assert close(weights_merged([models[0]] * 3, method, space="weights"), models[0][Q].flatten(), 1e-7)
    three = changes(3, 4, F64, {Q: (4, 4)})
    got = weights_merged(three, "karcher", space="weights", max_iter=200, tol=1e-13)
    unit = flatten(three) / flatten(three).norm(dim=1, keepdim=True)
    point = got / got.norm()
    cosine = unit @ point
    logs = (cosine.acos() / torch.sin(cosine.acos()))[:, None] * (unit - cosine[:, None] * point)
    assert float(logs.mean(0).norm()) < 1e-11
    assert not close(weights_merged(three, "multislerp", space="weights"), got, 1e-4)


def test_a_mean_that_vanishes() -> None:
    """Two opposite models are averaged; of three whose unit vectors cancel out there is none."""
    x = torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=F64)
    got = weights_merged([{"a.weight": each} for each in x], "multislerp", space="weights")
    assert close(got, torch.tensor([1.0, 0.0], dtype=F64), 1e-12)
    angles = torch.tensor([0.0, 2 / 3, 4 / 3], dtype=F64) * torch.pi
    star = [{"a.weight": torch.stack([angle.cos(), angle.sin()])} for angle in angles]
    with pytest.raises((OptionError, InputError), match="cancel out"):
        weights_merged(star, "multislerp", space="weights")
    for models in (star, [{"a.weight": each} for each in x]):
        assert weights_merged(models, "karcher", space="weights").isfinite().all()
