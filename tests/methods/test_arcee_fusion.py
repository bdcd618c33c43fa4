"""Arcee Fusion against its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import equal

from merging.errors import OptionError
from support import references
from support.changes import F32, changes
from support.on_models import WITHOUT_CONV, doubles, dtypes, rows, weights_merged
from support.references import flatten


@dtypes
def test_arcee_fusion(dtype: torch.dtype) -> None:
    """All but entries of float32 that lie at the threshold; rows are those of the last axis."""
    shapes = {name: shape for name, shape in WITHOUT_CONV.items() if name != "norm.weight"}
    for seed, size in ((1, 1.0), (2, 10.0)):
        a, b = ({name: size * value for name, value in each.items()} for each in changes(2, seed, dtype, shapes))
        got = weights_merged([a, b], "arcee_fusion").double()
        wanted = rows(lambda x: references.arcee_fusion(*x))(doubles([a, b]))
        assert 0.005 < float((wanted != flatten(doubles([a]))[0]).double().mean()) < 0.4
        assert float((got != wanted).double().mean()) <= (1e-3 if dtype == F32 else 0)
    assert equal(weights_merged([a, a], "arcee_fusion"), flatten([a])[0])
    with pytest.raises(OptionError, match="2 models"):
        weights_merged([a, b, a], "arcee_fusion")
