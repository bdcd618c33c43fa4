"""Model Stock by tensor and by row."""

from __future__ import annotations

import torch

import merging
from merging.maths.delta import LowRank
from support import references
from support.changes import F32, Q, changes, close, merged, written
from support.factors import low, pairs
from support.on_models import WITHOUT_CONV, doubles, dtypes, flat, plus, rows, weights_merged, within
from support.references import flatten


@dtypes
def test_model_stock(dtype: torch.dtype) -> None:
    """By tensor and by row; models that agree stay where they are, and those that have nothing in common go back."""
    (base,), models = changes(1, 3, dtype, WITHOUT_CONV), changes(4, 4, dtype, WITHOUT_CONV)
    common = [{name: value + 2 * models[0][name] for name, value in each.items()} for each in models]
    for wise, wanted in ((False, flat(references.model_stock)), (True, rows(references.model_stock))):
        for tuned in (models, common):
            got = merged(tuned, "model_stock", filter_wise=wise)
            assert close(got.double(), wanted(doubles(tuned)), 10 * within(dtype))
        got = weights_merged(plus(base, common), "model_stock", base=base, filter_wise=wise).double()
        assert close(got, flatten(doubles([base]))[0] + wanted(doubles(common)), 1e-5 if dtype == F32 else 1e-10)
    assert close(merged([models[0]] * 3, "model_stock"), flatten(models[:1])[0], 1e-6)
    up, down = models[0], {name: -value for name, value in models[0].items()}
    assert merged([up, down], "model_stock").isfinite().all()
    adapters = [{Q: low(pair)} for pair in pairs(9, 12, (2, 2))]
    assert not isinstance(merging.merge_deltas(adapters, method="model_stock", filter_wise=True)[Q], LowRank)
    got = merged(adapters, "model_stock", filter_wise=True)
    assert close(got, rows(references.model_stock)(written(adapters)), 1e-5)
