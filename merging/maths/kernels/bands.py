"""Keeping the changes of a range of magnitudes: the kernel of breadcrumbs."""

from __future__ import annotations

from typing import Any

from numba import float32

from merging.maths.kernels.scalars import change_row, kernel
from merging.maths.kernels.workspaces import CHUNK

__all__ = ["keep_band"]


@kernel
def keep_band(values: Any, base: Any, below: Any, high: Any, out: Any) -> None:
    """Write the changes of one model, 0 where their magnitudes are too small or too large.

    Args:
        values: the model's values, ``[size]``.
        base: the base's, or None where ``values`` are changes.
        below: the largest magnitude that is too small.
        high: the largest magnitude that is kept.
        out: receives the changes, ``[size]`` float32.
    """
    least, most, zero = float32(below), float32(high), float32(0)
    for first in range(0, len(values), CHUNK):
        own = out[first : first + CHUNK]
        change_row(values, base, first, own)
        for j in range(len(own)):
            size = abs(own[j])
            own[j] = (zero if size <= least else own[j]) - (zero if size <= most else own[j])
