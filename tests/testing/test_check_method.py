"""The laws hold for the methods that ship, and are broken by methods that do not do what they declare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import merging
from merging.methods import METHODS
from merging.testing import check_method


@pytest.mark.parametrize(
    "method", ["linear", "ties", "slerp", "opcm", "dare+magmax", "lines+arcee_fusion", "knots+ties", "larv"]
)
def test_shipped_methods_pass(method: str) -> None:
    check_method(method)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].load().needs_statistics])
def test_all_methods_pass(method: str) -> None:
    check_method(method, within=2e-2 if method == "iso_cts" else 1e-5)


def _whole_norm(deltas: Tensor) -> Tensor:
    return deltas.mean(0) / (1 + deltas.norm())


def _noisy(deltas: Tensor) -> Tensor:
    return deltas.mean(0) + torch.rand(())


def _adding(deltas: Tensor) -> Tensor:
    return deltas.mean(0) + 1


@pytest.mark.parametrize(
    ("function", "options", "law"),
    [
        (_whole_norm, {"needs": "element"}, "is exact on the pieces that it declares"),
        (_whole_norm, {"needs": "row"}, "is exact on the pieces that it declares"),
        (_noisy, {"needs": "element"}, "gives the same each time"),
        (_adding, {"needs": "element"}, "changes nothing where no model changes anything"),
    ],
)
def test_methods_that_break_a_law(function: Any, options: dict[str, Any], law: str) -> None:
    method = merging.method(f"test_broken{function.__name__}", **options)(function)
    with pytest.raises(AssertionError, match=law):
        check_method(method)
