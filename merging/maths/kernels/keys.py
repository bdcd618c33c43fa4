"""Keys of changes for radix selection: counted, and listed or binned where they are in a range."""

from __future__ import annotations

from typing import Any

from numba import int32, int64, njit, uint32

from merging.maths.kernels.scalars import bits_of, change_row, kernel
from merging.maths.kernels.workspaces import CHUNK

__all__ = ["gather_keys"]


_BLOCK = 64
"""Keys that are taken one by one if any of them is in the range: a divisor of CHUNK."""


@njit(inline="always")
def _select(keys: Any, low: Any, last: Any, out: Any) -> None:
    """Write the keys of a chunk from ``low`` on that are at most ``last`` greater."""
    place = 0
    for first in range(0, CHUNK, _BLOCK):
        inside = int32(0)
        for j in range(_BLOCK):
            inside = int32(inside + int32(uint32(keys[first + j] - low) <= last))
        if inside > 0:
            for j in range(_BLOCK):
                out[place] = keys[first + j]
                place += int64(uint32(keys[first + j] - low) <= last)


@kernel
def gather_keys(
    values: Any,
    base: Any,
    magnitudes: Any,
    bounds: Any,
    start: Any,
    listed: Any,
    counts: Any,
    work: Any,
    room: Any,
    out: Any,
) -> None:
    """Gather the keys of one model's changes that are in a range, from element ``start`` on, until the list is full.

    Keys are the ones of :func:`~merging.maths.order_statistics.keys`.

    Args:
        values: the model's values, ``[size]``.
        base: the base's, ``[size]``, or None where ``values`` are changes.
        magnitudes: whether absolute values are ranked.
        bounds: the least key of the range, the number of keys in it, and the shift of its bins: int64 ``[3]``.
        start: the first element.
        listed: receives the keys, from position ``out[2]`` on: int32.
        counts: of each bin, the number of its keys, int64; without bins the keys are listed.
        work: space, ``[1, CHUNK]`` float32.
        room: space, ``[2, CHUNK]`` int32.
        out: int64 ``[7]``, which is added to: the element to go on from, the number of keys below the range, the number
            of listed keys, the least and the greatest key of the range, the greatest magnitude, and the number of keys
            of at most 0.
    """
    size = len(values)
    own, keys, found = work[0], room[0], room[1]
    low, width, shift = int32(bounds[0]), bounds[1], bounds[2]
    last = uint32(width - 1)
    for first in range(start, size, CHUNK):
        count = min(CHUNK, size - first)
        change_row(values, base, first, own[:count])
        below, inside, nonpositive, greatest = int32(0), int32(0), int32(0), int32(0)
        for j in range(count):
            bits = int32(bits_of(own[j]))
            key = int32(bits & int32(0x7FFFFFFF))
            greatest = int32(max(greatest, key))
            if not magnitudes:
                sign = int32(bits >> int32(31))
                key = int32((key ^ sign) - sign)
            keys[j] = key
            below = int32(below + int32(key < low))
            inside = int32(inside + int32(uint32(key - low) <= last))
            nonpositive = int32(nonpositive + int32(key <= 0))
        if inside > 0:
            if len(counts) == 0 and out[2] + inside > len(listed):
                out[0] = first
                return
            _select(keys, low, last, found)  # keys of a former chunk, beyond the end, come last
            least, most = out[3], out[4]
            for j in range(inside):
                least, most = min(least, int64(found[j])), max(most, int64(found[j]))
            out[3], out[4] = least, most
            if len(counts):
                origin = int64(low) >> shift
                for j in range(inside):
                    counts[(int64(found[j]) >> shift) - origin] += 1
            else:
                place = out[2]
                for j in range(inside):
                    listed[place + j] = found[j]
                out[2] = place + inside
        out[1] += below
        out[5] = max(out[5], int64(greatest))
        out[6] += nonpositive
    out[0] = size
