"""Variances across models and what they select: the kernels of SCE."""

from __future__ import annotations

from typing import Any

from numba import float32

from merging.maths.kernels.scalars import change_row, kernel, multiply_add
from merging.maths.kernels.workspaces import CHUNK

__all__ = ["square_selected", "write_variances"]


@kernel
def write_variances(values: Any, base: Any, share: Any, fused: Any, work: Any, out: Any) -> None:
    """Write n times the variance of each entry across the models.

    Args:
        values: the models' values, ``[n, size]``, n at least 2.
        base: the base's, ``[size]``, or None where ``values`` are changes.
        share: 1 / n, ``[1]``.
        fused: see :func:`~merging.maths.kernels.switch.fuses`.
        work: space, ``[n + 1, CHUNK]`` float32.
        out: receives the result, ``[size]`` float32.
    """
    n, size = values.shape
    part = share[0]
    changes, mean = work[:n], work[n]
    for first in range(0, size, CHUNK):
        count = min(CHUNK, size - first)
        total, origin = out[first : first + count], changes[0, :count]
        change_row(values[0], base, first, origin)
        for i in range(1, n):
            own = changes[i, :count]
            change_row(values[i], base, first, own)
            if i == 1:
                for j in range(count):
                    own[j] = own[j] - origin[j]
                    mean[j] = own[j] * part
            else:
                for j in range(count):
                    own[j] = own[j] - origin[j]
                    mean[j] = multiply_add(own[j], part, mean[j], fused)
        for j in range(count):
            total[j] = mean[j] * mean[j]
        for i in range(1, n):
            own = changes[i, :count]
            for j in range(count):
                far = own[j] - mean[j]
                total[j] = multiply_add(far, far, total[j], fused)


@kernel
def square_selected(values: Any, base: Any, variances: Any, cut: Any, out: Any) -> None:
    """Write the squares of the changes, 0 where the variance is below a cut.

    Args:
        values: the models' values, ``[n, size]``.
        base: the base's, ``[size]``, or None where ``values`` are changes.
        variances: of each entry, ``[size]`` float32.
        cut: the least variance that is selected, ``[1]``; nothing is where it is NaN.
        out: receives the squares, ``[n, size]`` float32.
    """
    least = cut[0]
    for i in range(len(values)):
        own = out[i]
        change_row(values[i], base, 0, own)
        for j in range(len(own)):
            each = own[j] * float32(variances[j] >= least)
            own[j] = each * each
