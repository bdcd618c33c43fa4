"""Trimming changes, electing signs, and averaging what agrees with them: the kernels of TIES and its relatives."""

from __future__ import annotations

from typing import Any

from numba import float32, int32, njit

from merging.maths.kernels.scalars import change_row, kernel, multiply_add
from merging.maths.kernels.workspaces import CHUNK

__all__ = ["count_signs", "merge_agreeing"]


@njit(inline="always")
def _trim_row(values: Any, base: Any, first: Any, limit: Any, out: Any) -> None:
    """Write a model's changes of some elements, 0 up to the magnitude ``limit``."""
    change_row(values, base, first, out)
    if limit >= 0:
        for j in range(len(out)):
            out[j] = float32(0) if abs(out[j]) <= limit else out[j]


@njit(inline="always")
def _add_votes(changes: Any, vote: Any, starts: Any, votes: Any) -> None:
    """Add a model's votes to those before, or start with them."""
    if starts:
        for j in range(len(changes)):
            votes[j] = changes[j] * vote
    else:
        for j in range(len(changes)):
            votes[j] += changes[j] * vote


@kernel
def merge_agreeing(
    values: Any,
    base: Any,
    below: Any,
    votes: Any,
    weights: Any,
    numbers: Any,
    normalize: Any,
    fused: Any,
    work: Any,
    out: Any,
) -> None:
    """Write the mean, or the sum, of the changes that have the elected sign.

    Args:
        values: the models' values, ``[n, size]``.
        base: the base's, ``[size]``, or None where ``values`` are changes.
        below: of each model, the magnitude up to which changes are 0; negative where none are.
        votes: of each model, the factor of its change in the election.
        weights: of each model, the factor of its change; a negative one reverses it.
        numbers: the sign where votes cancel out, and the factor of the result.
        normalize: divide by the sum of the weights that agree.
        fused: see :func:`~merging.maths.kernels.switch.fuses`.
        work: space, ``[n + 3, CHUNK]`` float32.
        out: receives the result, ``[size]`` float32.
    """
    n, size = values.shape
    zero, one = float32(0), float32(1)
    trimmed, signs, total, mass = work[:n], work[n], work[n + 1], work[n + 2]
    otherwise, scale = numbers[0], numbers[1]
    for first in range(0, size, CHUNK):
        count = min(CHUNK, size - first)
        for i in range(n):
            own = trimmed[i, :count]
            _trim_row(values[i], base, first, below[i], own)
            _add_votes(own, votes[i], i == 0, signs)
        for j in range(count):
            each = signs[j]
            signs[j] = one if each > 0 else (-one if each < 0 else otherwise)
        for i in range(n):
            own, weight = trimmed[i, :count], abs(weights[i])
            turn = -one if weights[i] < 0 else one
            if i == 0:
                for j in range(count):
                    agreeing = turn * own[j] * signs[j]
                    agreeing = zero if agreeing < 0 else agreeing
                    total[j] = agreeing * weight
                    mass[j] = weight if agreeing > 0 else zero
            else:
                for j in range(count):
                    agreeing = turn * own[j] * signs[j]
                    agreeing = zero if agreeing < 0 else agreeing
                    total[j] = multiply_add(agreeing, weight, total[j], fused)
                    mass[j] += weight if agreeing > 0 else zero
        into = out[first : first + count]
        if normalize:
            for j in range(count):
                whole = mass[j]
                into[j] = total[j] * signs[j] / (whole + (one if whole == 0 else zero)) * scale
        else:
            for j in range(count):
                into[j] = total[j] * signs[j] * scale


@kernel
def count_signs(values: Any, base: Any, below: Any, votes: Any, work: Any, out: Any) -> None:
    """Write how many more elements elect + than -.

    Args:
        values: the models' values, ``[n, size]``.
        base: the base's, ``[size]``, or None where ``values`` are changes.
        below: of each model, the magnitude up to which changes are 0; negative where none are.
        votes: of each model, the factor of its change in the election.
        work: space, ``[2, CHUNK]`` float32.
        out: receives the number, ``[1, 1]`` float64.
    """
    n, size = values.shape
    own, signs = work[0], work[1]
    balance = 0
    for first in range(0, size, CHUNK):
        count = min(CHUNK, size - first)
        for i in range(n):
            _trim_row(values[i], base, first, below[i], own[:count])
            _add_votes(own[:count], votes[i], i == 0, signs)
        for j in range(count):
            balance += int32(signs[j] > 0) - int32(signs[j] < 0)
    out[0, 0] = balance
