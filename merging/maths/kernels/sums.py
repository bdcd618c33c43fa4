"""Sums of magnitudes, added up in the order in which torch adds up float32."""

from __future__ import annotations

from typing import Any

from numba import float32

from merging.maths.kernels.scalars import change_row, kernel

__all__ = ["sum_magnitudes"]

_LANES, _STEPS = 32, 16
"""Numbers that torch adds at once, in four vectors of eight; and steps after which it begins a new sum."""


@kernel
def _sum_span(row: Any, totals: Any) -> Any:
    """Return the sum of absolute values, as torch adds up a multiple of 512 numbers, up to 8,192."""
    for k in range(_LANES):
        totals[k] = 0
    for first in range(0, len(row), _LANES * _STEPS):
        block = row[first : first + _LANES * _STEPS]
        for k in range(_LANES):
            total = float32(0)
            for step in range(_STEPS):
                total += abs(block[step * _LANES + k])
            totals[k] += total
    for part in range(1, 4):
        for k in range(8):
            totals[k] += totals[8 * part + k]
    whole = float32(0)
    for k in range(8):
        whole += totals[k]
    return whole


@kernel
def sum_magnitudes(values: Any, base: Any, work: Any, out: Any) -> None:
    """Write the sums of absolute changes of each model over spans of 4,096 elements; the rest is left out.

    Args:
        values: the models' values, ``[n, size]``.
        base: the base's, ``[size]``, or None where ``values`` are changes.
        work: space for 4,128 numbers, float32.
        out: receives the sums, ``[n, size // 4096]`` float32.
    """
    own, totals = work[:4096], work[4096 : 4096 + _LANES]
    for i in range(len(out)):
        for part in range(out.shape[1]):
            change_row(values[i], base, 4096 * part, own)
            out[i, part] = _sum_span(own, totals)
