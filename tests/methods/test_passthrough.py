"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

import pytest
from torch import equal

import merging
from merging.errors import OptionError
from merging.maths.delta import LowRank
from support.changes import F32, PLACES, Q, changes, close, merged
from support.factors import low, pairs
from support.on_models import plus, weights_merged
from support.references import flatten


def test_passthrough() -> None:
    (base,), (change,) = changes(1, 3, F32, PLACES), changes(1, 4, F32, PLACES)
    assert equal(weights_merged([change], "passthrough"), flatten([change])[0])
    assert close(weights_merged([change], "passthrough", scale=0.3), 0.3 * flatten([change])[0])
    tuned = plus(base, [change])
    assert equal(weights_merged(tuned, "passthrough"), flatten(tuned)[0])
    adapter = {Q: low(pairs(9, 12, (2,))[0])}
    got = merging.merge_deltas([adapter], method="passthrough", scale=0.5)[Q]
    assert isinstance(got, LowRank) and close(got.dense(), 0.5 * adapter[Q].dense())
    with pytest.raises(OptionError, match="merges 1 model"):
        merged([change, change], "passthrough")
