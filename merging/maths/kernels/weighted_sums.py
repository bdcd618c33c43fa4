"""Weighted sums of changes by a compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merging.maths.kernels.switch import fuses, run_kernel, usable
from merging.maths.kernels.workspaces import make_workspace
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.stored_values import StoredValues

__all__ = ["add_weighted"]


def add_weighted(stored: StoredValues, weights: Sequence[Any]) -> Tensor | None:
    """Return the weighted sum ``[*shape]`` of changes, in order; None where torch must compute it."""
    if not weights or not usable(stored.values, stored.base) or any(isinstance(each, Tensor) for each in weights):
        return None
    numbers = torch.tensor(weights, dtype=torch.float32)
    if not bool(numbers.isfinite().all()):
        return None
    out = torch.empty(stored.values.shape[1], dtype=torch.float32)
    arguments = (stored.values, stored.base, numbers, fuses(), make_workspace(1), out)
    return out.view(stored.shape) if run_kernel("combine.add_weighted", *arguments) else None
