"""SCE: what is selected where variances are equal."""

from __future__ import annotations

import itertools

import pytest
import torch

from support import references
from support.changes import PLACES, changes, close, merged
from support.on_models import doubles, dtypes, flat, within


@pytest.mark.parametrize("count", [2, 4])
@dtypes
def test_sce_selects_what_equals_the_threshold(count: int, dtype: torch.dtype) -> None:
    """On a grid, where variances are exact and many are equal or zero."""
    models = [{n: (100 * v).round() / 64 for n, v in each.items()} for each in changes(count, 4, dtype, PLACES)]
    chosen = set()
    for density, select in itertools.product([0.05, 0.3, 0.7], ["weights", "deltas"]):
        wanted = flat(lambda x, density=density, select=select: references.sce(x, density, select))(doubles(models))
        assert close(merged(models, "sce", density=density, select=select).double(), wanted, within(dtype))
        chosen.add(int(wanted.count_nonzero()))
    assert len(chosen) > 3
