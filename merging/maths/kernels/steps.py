"""Steps of methods by compiled kernels: each returns None where torch must compute it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from merging.maths.coefficients import number
from merging.maths.delta import Stack
from merging.maths.kernels.switch import fuses, run_kernel, usable
from merging.maths.kernels.workspaces import make_workspace
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.stored_values import StoredValues

__all__ = [
    "count_elected",
    "encode_sum",
    "has_extremes",
    "limits_of",
    "merge_agreeing",
    "numbers_of",
    "stored_values",
    "write_changes",
]


def stored_values(stack: Stack, *numbers: Any) -> StoredValues | None:
    """Return the changes of a stack for a kernel; None where kernels cannot take them, or numbers with gradients."""
    if not usable() or stack.low_rank or any(isinstance(each, Tensor) and each.requires_grad for each in numbers):
        return None
    stored = stack.stored
    return stored if usable(stored.values, stored.base) else None


def numbers_of(*values: Any) -> Tensor | None:
    """Return numbers as float32 ``[n]``, rounded as torch rounds a number before it multiplies; None if one is too big.

    For arguments of kernels: a tensor's :meth:`numpy` is one of them without being copied.
    """
    return _numbers(tuple(map(number, values)))


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...]) -> Tensor | None:
    """Return numbers as a tensor that no kernel writes to: each tile of a merge has the same ones."""
    numbers = torch.tensor(values, dtype=torch.float64).float()
    return numbers if bool(numbers.isfinite().all()) else None


def limits_of(thresholds: Sequence[float | None]) -> Tensor:
    """Return the largest magnitude below each threshold, float32 ``[n]``; -1 where there is none."""
    own = torch.tensor([math.nan if each is None else each for each in thresholds], dtype=torch.float32)
    return torch.nextafter(own, torch.zeros(())).nan_to_num(-1)


def merge_agreeing(
    stack: Stack,
    *,
    thresholds: Sequence[float | None],
    votes: Sequence[float],
    weights: Sequence[Any],
    otherwise: float = 1.0,
    scale: Any = 1.0,
    normalize: bool = True,
) -> Tensor | None:
    """Return the mean ``[*shape]`` of what is left of the changes, and agrees with the elected signs.

    Args:
        stack: the changes.
        thresholds: of each model, the magnitude below which changes are 0; None for no threshold.
        votes: of each model, the factor of its change in the election.
        weights: of each model, the factor of its change in the mean; a negative one reverses it.
        otherwise: the sign where votes cancel out.
        scale: the factor of the result.
        normalize: divide by the sum of the weights that agree.
    """
    stored = stored_values(stack, *weights, scale)
    shares, ballots, rest = numbers_of(*weights), numbers_of(*votes), numbers_of(otherwise, scale)
    if stored is None or shares is None or ballots is None or rest is None:
        return None
    out = torch.empty(stored.values.shape[1], dtype=torch.float32)
    numbers = limits_of(thresholds), ballots, shares, rest, normalize, fuses()
    arguments = (stored.values, stored.base, *numbers, make_workspace(len(stack) + 3), out)
    return out.view(stored.shape) if run_kernel("agreement.merge_agreeing", *arguments) else None


def count_elected(stack: Stack, thresholds: Sequence[float | None], votes: Sequence[float]) -> Tensor | None:
    """Return how many more elements elect + than -: ``[1, 1]`` float64."""
    stored, ballots = stored_values(stack), numbers_of(*votes)
    if stored is None or ballots is None:
        return None
    out = torch.empty(1, 1, dtype=torch.float64)
    arguments = (stored.values, stored.base, limits_of(thresholds), ballots, make_workspace(2), out)
    ran = run_kernel("agreement.count_signs", *arguments)
    return out if ran else None


def has_extremes(*values: Tensor | None) -> bool:
    """Return whether stored values are not all finite, or so large that a difference of two may not be."""
    answer = torch.empty(1)
    each_has = (
        not run_kernel("tiles.find_extremes", each.view(-1), answer) or bool(answer)
        for each in values
        if each is not None and each.numel()
    )
    return any(each_has)


def write_changes(values: Tensor, base: Tensor | None, out: Tensor) -> Tensor:
    """Write stored values ``[n, size]`` as float32, minus the base's ``[size]`` if there is one, and return them."""
    if usable(values, base, out) and run_kernel("tiles.write_changes", values, base, out):
        return out
    out.copy_(values)
    return out if base is None else out.sub_(base.to(out.dtype))


def encode_sum(change: Tensor, base: Tensor | None, factor: float, out: Tensor) -> bool:
    """Write the base plus a change times a factor in the type of ``out``, ``[size]``, and return whether it is done.

    It is not where torch must do it, or where a number is so large that torch must look at it.
    """
    if not usable(change, base, out) or numbers_of(factor) is None:
        return False
    arguments = (change, None if base is None else base.reshape(-1), factor, fuses(), out)
    return run_kernel("tiles.add_change", *arguments) and not has_extremes(out)
