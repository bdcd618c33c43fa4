"""Weighted sums, largest changes and consensus, element by element."""

from __future__ import annotations

from typing import Any

from numba import float32

from merging.maths.kernels.scalars import change_row, kernel, multiply_add
from merging.maths.kernels.workspaces import CHUNK

__all__ = ["add_weighted", "keep_agreed", "take_largest"]


@kernel
def add_weighted(values: Any, base: Any, weights: Any, fused: Any, work: Any, out: Any) -> None:
    """Write the weighted sum of the changes, in order.

    Args:
        values: the models' values, ``[n, size]``.
        base: the base's, ``[size]``, or None where ``values`` are summed.
        weights: of each model, the factor of its change.
        fused: see :func:`~merging.maths.kernels.switch.fuses`.
        work: space, ``[1, CHUNK]`` float32.
        out: receives the sum, ``[size]`` float32.
    """
    n, size = values.shape
    for first in range(0, size, CHUNK):
        count = min(CHUNK, size - first)
        own, total = work[0, :count], out[first : first + count]
        for i in range(n):
            weight = weights[i]
            change_row(values[i], base, first, own)
            if i == 0:
                for j in range(count):
                    total[j] = own[j] * weight
            else:
                for j in range(count):
                    total[j] = multiply_add(own[j], weight, total[j], fused)


@kernel
def take_largest(values: Any, base: Any, weights: Any, work: Any, out: Any) -> None:
    """Write the weighted change of largest magnitude, the positive one of two.

    Args:
        values: the models' values, ``[n, size]``, none of them NaN.
        base: the base's, ``[size]``, or None where ``values`` are changes.
        weights: of each model, the factor of its change; the last number multiplies the result.
        work: space, ``[2, CHUNK]`` float32.
        out: receives the result, ``[size]`` float32.
    """
    n, size = values.shape
    low, scale = work[1], weights[n]
    for first in range(0, size, CHUNK):
        count = min(CHUNK, size - first)
        own, high = work[0, :count], out[first : first + count]
        for i in range(n):
            weight = weights[i]
            change_row(values[i], base, first, own)
            if i == 0:
                for j in range(count):
                    high[j] = own[j] * weight
                    low[j] = high[j]
            else:
                for j in range(count):
                    each = own[j] * weight
                    high[j] = each if each > high[j] else high[j]
                    low[j] = each if each < low[j] else low[j]
        for j in range(count):
            size_of = high[j] if high[j] > -low[j] else -low[j]
            high[j] = (size_of if high[j] + low[j] >= 0 else -size_of) * scale


@kernel
def keep_agreed(values: Any, base: Any, weights: Any, numbers: Any, agree: Any, work: Any, out: Any) -> None:
    """Write the sum of the weighted changes, 0 where too few models need it.

    Args:
        values: the models' values, ``[n, size]``.
        base: the base's, ``[size]``, or None where ``values`` are changes.
        weights: of each model, the factor of its change.
        numbers: the share of the others' change that a model's own must reach, and the factor of the result.
        agree: the number of models that must need an entry.
        work: space, ``[n + 1, CHUNK]`` float32.
        out: receives the result, ``[size]`` float32.
    """
    n, size = values.shape
    changes, needed = work[:n], work[n]
    threshold, scale, least = numbers[0], numbers[1], float32(agree)
    for first in range(0, size, CHUNK):
        count = min(CHUNK, size - first)
        total = out[first : first + count]
        for i in range(n):
            own, weight = changes[i, :count], weights[i]
            change_row(values[i], base, first, own)
            if i == 0:
                for j in range(count):
                    own[j] = own[j] * weight
                    total[j] = own[j]
            else:
                for j in range(count):
                    own[j] = own[j] * weight
                    total[j] = total[j] + own[j]
        needed[:] = 0
        for i in range(n):
            own = changes[i, :count]
            for j in range(count):
                needed[j] += float32(abs(own[j]) >= threshold * abs(total[j] - own[j]))
        for j in range(count):
            total[j] = total[j] * float32(needed[j] >= least) * scale
