"""NearSwap against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import equal

from merging.errors import OptionError
from support import references
from support.changes import F32, PLACES, changes, close, merged
from support.on_models import doubles, dtypes, plus, weights_merged
from support.references import flatten


@dtypes
def test_nearswap(dtype: torch.dtype) -> None:
    """As its formula has it; which is the change, clipped."""
    (base,), (change,) = changes(1, 3, dtype, PLACES), changes(1, 4, dtype, PLACES)
    change = {name: torch.where(value.abs() < 1e-4, 0, value) for name, value in change.items()}
    (tuned,) = plus(base, [change])
    origin, other = (flatten(doubles([each]))[0] for each in (base, tuned))
    for t in (0.001, 0.02, 10.0):
        got = weights_merged([tuned], "nearswap", base=base, t=t).double()
        wanted = references.nearswap(origin, other, t)
        assert float((got - wanted).abs().max()) < (1e-6 if dtype == F32 else 1e-15)
        assert torch.allclose(wanted, origin + (other - origin).clamp(-t, t), atol=1e-15)
        assert close(merged([change], "nearswap", t=t).double(), flatten(doubles([change]))[0].clamp(-t, t), 1e-6)
    assert equal(
        weights_merged([tuned], "nearswap", base=base), weights_merged([tuned], "nearswap", base=base, t=0.001)
    )
    with pytest.raises(OptionError, match="merges 1 model"):
        weights_merged([tuned, tuned], "nearswap", base=base)
