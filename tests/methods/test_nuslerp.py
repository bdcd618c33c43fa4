"""NuSlerp along every axis, of weights, changes and factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merging
from merging.maths.delta import LowRank
from support import references
from support.changes import F32, F64, PLACES, Q, changes, close, merged, written
from support.factors import low, pairs
from support.on_models import WITHOUT_CONV, doubles, dtypes, flat, plus, rows, weights_merged, within
from support.references import flatten

TWO_AXES: Any = {name: shape for name, shape in PLACES.items() if len(shape) == 2}
AXES: Any = {
    "flat": (PLACES, lambda w: flat(lambda x: references.nuslerp(x, w))),
    "rows": (WITHOUT_CONV, lambda w: rows(lambda x: references.nuslerp(x, w))),
    "columns": (TWO_AXES, lambda w: rows(lambda x: references.nuslerp(x.mT, w).mT)),
}


@pytest.mark.parametrize("axis", AXES)
@dtypes
def test_nuslerp(axis: str, dtype: torch.dtype) -> None:
    shapes, reference = AXES[axis]
    (base,), models = changes(1, 3, dtype, shapes), changes(2, 4, dtype, shapes)
    for weights in ((1.0, 1.0), (0.3, 0.9), (0.0, 2.0)):
        options = {"axis": axis, "weights": weights}
        wanted = reference(weights)(doubles(models))
        got = weights_merged(models, "nuslerp", space="weights", **options)
        assert close(got.double(), wanted, within(dtype))
        assert close(merged(models, "nuslerp", space="changes", **options).double(), wanted, within(dtype))
        on_base = weights_merged(plus(base, models), "nuslerp", base=base, space="changes", **options).double()
        assert close(on_base, flatten(doubles([base]))[0] + wanted, 1e-5 if dtype == F32 else 1e-12)
    default = weights_merged(models, "nuslerp")
    assert close(default.double(), flat(references.nuslerp)(doubles(models)), within(dtype))


def test_nuslerp_of_factors() -> None:
    made = [(u.double(), d.double()) for u, d in pairs(9, 12, (2, 5))]
    for transposed in (False, True):
        adapters = [{Q: low(pair, transposed)} for pair in made]
        for axis, (_, reference) in AXES.items():
            options: Any = {"axis": axis, "space": "changes", "weights": (0.3, 0.9)}
            assert close(merged(adapters, "nuslerp", **options), reference((0.3, 0.9))(written(adapters)), 1e-9)
    got = merging.merge_deltas(adapters, method="nuslerp", space="changes")[Q]
    assert isinstance(got, LowRank) and got.rank == 7 and got.transposed


@pytest.mark.parametrize("axis", AXES)
def test_nuslerp_of_models_with_little_or_no_angle_between(axis: str) -> None:
    shapes, reference = AXES[axis]
    first, second = changes(2, 4, F64, shapes)
    weights = (0.3, 0.7)
    for near in (
        first,
        {name: 2 * value for name, value in first.items()},
        plus(first, [{n: 1e-3 * v for n, v in second.items()}])[0],
    ):
        models = [first, near]
        assert close(weights_merged(models, "nuslerp", axis=axis, weights=weights), reference(weights)(models), 1e-5)
    nothing = {name: 0 * value for name, value in first.items()}
    for models in ([first, nothing], [nothing, first], [nothing, nothing], [first, {n: -v for n, v in first.items()}]):
        assert weights_merged(models, "nuslerp", axis=axis, weights=weights).isfinite().all()
