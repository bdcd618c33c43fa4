"""Dropping changes by the ranks of their magnitudes within rows: the kernels of DELLA."""

from __future__ import annotations

from typing import Any

from numba import float32, int32, uint32

from merging.maths.kernels.draws import draw_row
from merging.maths.kernels.scalars import bits_of, change_row, kernel

__all__ = ["drop_by_rank"]

_FEW = 24
"""Elements of a row that are ranked one by one, at most."""


@kernel
def _bin_row(keys: Any, bins: Any, starts: Any) -> None:
    """Sort the keys of a row into bins by size; keys of 0 have a bin of their own, the first.

    Args:
        keys: the magnitudes of the row as integers, int32.
        bins: receives the bin of each key.
        starts: receives the number of keys before each bin, and the number of all keys.
    """
    least, most = uint32(0xFFFFFFFF), int32(0)
    for j in range(len(keys)):
        least = min(least, uint32(keys[j] - int32(1)))  # 0 wraps around
        most = max(most, keys[j])
    origin, shift, count = int32(least) + int32(1), 0, len(starts) - 1
    while most and (most - origin) >> shift > count - 2:
        shift += 1
    for j in range(len(keys)):
        bins[j] = ((keys[j] - origin) >> int32(shift)) + int32(1) if keys[j] else int32(0)
    for b in range(count + 1):
        starts[b] = 0
    for j in range(len(keys)):
        starts[uint32(bins[j]) + 1] += 1
    for b in range(count):
        starts[b + 1] += starts[b]


@kernel
def _count_smaller(keys: Any, bins: Any, starts: Any, element: Any) -> Any:
    """Return the rank of one element of a row: the number of smaller ones, or of equal ones before it."""
    own, own_bin = keys[element], bins[element]
    smaller = starts[own_bin]
    for j in range(len(keys)):
        smaller += bins[j] == own_bin and (keys[j] < own or (keys[j] == own and j < element))
    return smaller


@kernel
def _rank_ties(keys: Any, bins: Any, tables: Any, bits: Any, limits: Any, states: Any) -> Any:
    """Decide on the elements of bins whose keys are all equal, by position; return the number left open."""
    starts, last, mixed, filled = tables[0], tables[3], tables[4], tables[5]
    count = len(starts) - 1
    for b in range(count):
        mixed[b], filled[b] = 0, starts[b]
    for j in range(len(keys)):
        last[uint32(bins[j])] = keys[j]
    for j in range(len(keys)):
        b = uint32(bins[j])
        if keys[j] != last[b]:
            mixed[b] = 1
        states[j] |= filled[b] << 2
        filled[b] += 1
    left = 0
    for j in range(len(keys)):
        rank, state = uint32(states[j] >> 2), states[j] & 3
        close = state == 1 and mixed[uint32(bins[j])]
        tied = 2 if bits[j] <= limits[rank] else 0
        states[j] = tied if state == 1 and not close else state
        left += close
    return left


@kernel
def drop_by_rank(
    values: Any,
    base: Any,
    start: Any,
    key: Any,
    salt: Any,
    limits: Any,
    room: Any,
    tables: Any,
    out: Any,
    marks: Any,
    left: Any,
) -> None:
    """Write the changes of one model, 0 where they are dropped.

    Args:
        values: the model's values, ``[size]``, of whole rows.
        base: the base's, or None where ``values`` are changes.
        start: the position of the first element in its tensor.
        key: the first word of the key of the place.
        salt: the second one.
        limits: the greatest random bits that keep an entry, by rank, rising, ``[columns]`` int32.
        room: space for rows, ``[4, columns]`` int32.
        tables: space for bins and one more, ``[6, bins + 1]`` int32.
        out: receives the changes, ``[size]`` float32.
        marks: receives 1 for kept entries and 0 for others, ``[size]`` uint8.
        left: receives 1 for each row that has too many close magnitudes and is written whole, 0 for others.
    """
    keys, bins, bits, states = room[0], room[1], room[2], room[3]
    starts, least, most = tables[0], tables[1], tables[2]
    columns, count = len(keys), len(starts) - 1
    for row in range(len(left)):
        first = row * columns
        own, mine = out[first : first + columns], marks[first : first + columns]
        change_row(values, base, first, own)
        draw_row(start + first, key, salt, bits)
        for j in range(columns):
            keys[j] = int32(bits_of(own[j]) & uint32(0x7FFFFFFF))
        _bin_row(keys, bins, starts)
        for b in range(count):
            least[b] = limits[uint32(min(starts[b], columns - 1))]
            most[b] = limits[uint32(max(starts[b + 1] - 1, 0))]
        for j in range(columns):
            b = uint32(bins[j])
            states[j] = int32(bits[j] <= least[b]) + int32(bits[j] <= most[b])
        unsure = 0
        for j in range(columns):
            unsure += states[j] == 1
        if unsure > _FEW:
            unsure = _rank_ties(keys, bins, tables, bits, limits, states)
        left[row] = unsure > _FEW
        if unsure > _FEW:
            continue
        if unsure:
            for j in range(columns):
                if states[j] == 1:
                    states[j] = 2 if bits[j] <= limits[_count_smaller(keys, bins, starts, j)] else 0
        for j in range(columns):
            mine[j] = states[j] >> 1
        for j in range(columns):
            own[j] = own[j] * float32(mine[j])
