"""Comparing merged values with an output's: the differences that another processor may make, and all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from merging.engine.comparing import ComparingSink


@dataclass
class Held:
    """A tensor of an output."""

    values: Tensor

    def read_into(self, into: Tensor, start: int) -> None:
        """Read values from ``start`` on."""
        into.copy_(self.values[start : start + len(into)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("factor", "rounding"), [(1.0, True), (8.0, False)])
def test_each_value_is_compared_within_its_own_rounding(dtype: torch.dtype, factor: float, rounding: bool) -> None:
    """A value that is small next to the largest one is not hidden by it."""
    expected = torch.tensor([0.25, 1.0, -0.125]).to(dtype)
    step = factor * (torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-15)
    found = expected.double()
    found[2] *= 1 + step
    sink = ComparingSink({"weight": cast(Any, Held(found.to(dtype)))})
    sink.write("weight", expected)
    difference = sink.differences["weight"]
    assert (difference.position, difference.count, difference.rounding) == (2, 1, rounding)
    assert sink.elements == {"weight": 3}
