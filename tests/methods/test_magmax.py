"""MagMax and Consensus against their naive references."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import equal

from support import references
from support.changes import F64, changes, close, merged
from support.on_models import coarse
from support.references import flatten


@pytest.mark.parametrize("weights", [{}, {"weights": (1.0, 0.7, -0.4, 1.3, 0.0)}])
def test_magmax_and_consensus(weights: Any) -> None:
    for models in (changes(5, 1), coarse(changes(5, 1)), changes(5, 1, F64)):
        models[1] = {name: -value for name, value in models[0].items()}
        wanted = references.magmax(flatten(models), scale=0.5, **weights)
        got = merged(models, "magmax", scale=0.5, **weights)
        assert close(got, wanted) if got.dtype == F64 else equal(got, wanted)
    for threshold, agree in itertools.product([0.2, 0.4, 1.0], [1, 2, 4]):
        options: Any = {"threshold": threshold, "agree": agree, "scale": 0.3, **weights}
        wanted = references.consensus(flatten(models), **options)
        assert agree == 4 or wanted.any()
        assert close(merged(models, "consensus", **options), wanted)
