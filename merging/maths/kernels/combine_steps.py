"""Steps of methods over all models' changes by compiled kernels: each returns None where torch must compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merging.maths.delta import Stack
from merging.maths.kernels.steps import numbers_of, stored_values
from merging.maths.kernels.switch import fuses, run_kernel
from merging.maths.kernels.workspaces import make_workspace
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.stored_values import StoredValues

__all__ = ["keep_agreed", "square_selected", "take_largest", "write_variances"]


def take_largest(stack: Stack, weights: Sequence[Any], scale: Any) -> Tensor | None:
    """Return the weighted change ``[*shape]`` of largest magnitude, the positive one of two, times a factor.

    A change of 0 has no sign of its own here, so that it must be added to a base, and weights must be above 0.
    """
    stored, numbers = stored_values(stack, *weights, scale), numbers_of(*weights, scale)
    if stored is None or numbers is None or stored.base is None or bool((numbers <= 0).any()):
        return None
    out = _like(stored)
    ran = run_kernel("combine.take_largest", stored.values, stored.base, numbers, make_workspace(2), out)
    return out.view(stored.shape) if ran else None


def keep_agreed(stack: Stack, *, weights: Sequence[Any], threshold: float, agree: int, scale: Any) -> Tensor | None:
    """Return the sum ``[*shape]`` of the weighted changes, 0 where fewer than ``agree`` models need it."""
    stored, rest = stored_values(stack, *weights, scale, threshold), numbers_of(threshold, scale)
    numbers = numbers_of(*weights)
    if stored is None or numbers is None or rest is None:
        return None
    out = _like(stored)
    arguments = (stored.values, stored.base, numbers, rest, agree, make_workspace(len(stack) + 1), out)
    ran = run_kernel("combine.keep_agreed", *arguments)
    return out.view(stored.shape) if ran else None


def write_variances(stack: Stack) -> Tensor | None:
    """Return n times the variance ``[*shape]`` of each entry across n models, at least two."""
    stored = stored_values(stack)
    if stored is None or len(stack) < 2:
        return None
    out, share = _like(stored), torch.tensor([1 / len(stack)])
    arguments = (stored.values, stored.base, share, fuses(), make_workspace(len(stack) + 1), out)
    ran = run_kernel("variances.write_variances", *arguments)
    return out.view(stored.shape) if ran else None


def square_selected(stack: Stack, variances: Tensor, cut: float) -> Tensor | None:
    """Return the squares ``[n, *shape]`` of the changes whose variance reaches a cut, and 0 for others."""
    stored = stored_values(stack)
    if stored is None:
        return None
    out, least = torch.empty(stored.values.shape), torch.tensor([cut])
    ran = run_kernel("variances.square_selected", stored.values, stored.base, variances.reshape(-1), least, out)
    return out.view(len(stack), *stored.shape) if ran else None


def _like(stored: StoredValues) -> Tensor:
    return torch.empty(stored.values.shape[1], dtype=torch.float32)
