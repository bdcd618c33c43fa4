"""Dropping changes at random: the draws of :mod:`merging.maths.randomness`, compared and applied in one pass."""

from __future__ import annotations

from typing import Any

from numba import float32, int32, njit, uint32

from merging.maths.kernels.scalars import change_row, kernel
from merging.maths.kernels.workspaces import CHUNK

__all__ = ["draw_row", "drop_uniformly", "keep_marked"]


@njit(inline="always")
def draw_row(start: Any, key: Any, salt: Any, out: Any) -> None:
    """Write the random bits of elements from position ``start`` on, with the key of their place."""
    step, first, second = uint32(0x9E3779B1), uint32(0x7FEB352D), uint32(0x846CA68B)
    origin, other = uint32(uint32(start) * step + uint32(key)), uint32(salt)
    for j in range(len(out)):
        bits = uint32(uint32(j) * step + origin)
        bits = uint32(bits ^ (bits >> uint32(16)))
        bits = uint32(uint32(bits * first) ^ other)
        bits = uint32(bits ^ (bits >> uint32(15)))
        out[j] = int32(uint32(bits * second))


@kernel
def drop_uniformly(
    values: Any, base: Any, start: Any, key: Any, salt: Any, limit: Any, divisor: Any, bits: Any, out: Any
) -> None:
    """Write the changes of one model, 0 where they are dropped.

    Args:
        values: the model's values, ``[size]``.
        base: the base's, or None where ``values`` are changes.
        start: the position of the first element in its tensor.
        key: the first word of the key of the place.
        salt: the second one.
        limit: entries whose random bits are below it are kept.
        divisor: the kept changes are divided by it.
        bits: space, ``[1, CHUNK]`` int32.
        out: receives the changes, ``[size]`` float32.
    """
    zero, one, whole = float32(0), float32(1), float32(divisor)
    for first in range(0, len(values), CHUNK):
        own = out[first : first + CHUNK]
        mine = bits[0, : len(own)]
        change_row(values, base, first, own)
        draw_row(start + first, key, salt, mine)
        if whole == one:
            for j in range(len(own)):
                own[j] = own[j] * (one if mine[j] < limit else zero)
        else:
            for j in range(len(own)):
                own[j] = own[j] * (one if mine[j] < limit else zero) / whole


@kernel
def keep_marked(values: Any, base: Any, marks: Any, out: Any) -> None:
    """Write the changes of one model, 0 where they are not marked.

    Args:
        values: the model's values, ``[size]``.
        base: the base's, or None where ``values`` are changes.
        marks: one bit an element, as :func:`~merging.maths.bits.pack_bits` returns them.
        out: receives the changes, ``[size]`` float32.
    """
    for bit in range(8):
        begin = min(bit * len(marks), len(values))
        stop = min(begin + len(marks), len(values))
        for first in range(begin, stop, CHUNK):
            own = out[first : min(first + CHUNK, stop)]
            mine = marks[first - begin : first - begin + len(own)]
            change_row(values, base, first, own)
            for j in range(len(own)):
                own[j] = own[j] * float32((mine[j] >> bit) & 1)
