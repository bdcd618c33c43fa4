"""Competition among changes: the kernels of PCB around torch's exponentials and hyperbolic tangents."""

from __future__ import annotations

from typing import Any

import numpy
from numba import float32, njit

from merging.maths.kernels.scalars import change_row, kernel
from merging.maths.kernels.workspaces import CHUNK

__all__ = ["merge_competing", "prepare_scores"]


@njit(inline="always")
def _sign(value: Any) -> Any:
    return float32(1) if value > 0 else (float32(-1) if value < 0 else float32(0))


@kernel
def prepare_scores(
    values: Any,
    base: Any,
    first: Any,
    ends: Any,
    signed: Any,
    exponents: Any,
    products: Any,
    linear: Any,
    places: Any,
    found: Any,
    work: Any,
) -> None:
    """Write the exponent of each score, and the product whose hyperbolic tangent is its other factor.

    Args:
        values: the models' values, ``[n, elements]``.
        base: the base's, ``[elements]``, or None where ``values`` are changes.
        first: the first element.
        ends: the ends of each model's magnitudes, ``[n, 2]`` float32.
        signed: whether changes agree with the sum of signed sizes, instead of with the sum of changes.
        exponents: receives ``[n, size]`` float32.
        products: receives ``[n, size]`` float32.
        linear: the largest number whose tanh is the number itself.
        places: receives the flat positions of larger products, int32, as long as there is room.
        found: receives their number, int64.
        work: space, ``[n + 1, CHUNK]`` float32.
    """
    n, size = exponents.shape
    own, total, many = work[:n], work[n], float32(n)
    less, limit, taken = float32(1 if n >= 40 else 0), float32(linear), 0
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        for i in range(n):
            mine, sizes = own[i][:count], exponents[i][start : start + count]
            change_row(values[i], base, first + start, mine)
            low, high = ends[i, 0], ends[i, 1]
            span = high - low if high > low else float32(numpy.inf)
            for j in range(count):
                sizes[j] = (min(max(abs(mine[j]), low), high) - low) / span
            if i == 0:
                for j in range(count):
                    total[j] = _sign(mine[j]) * sizes[j] if signed else mine[j]
            else:
                for j in range(count):
                    total[j] += _sign(mine[j]) * sizes[j] if signed else mine[j]
            for j in range(count):
                square = sizes[j] * sizes[j] - less
                sizes[j] = square * many
        for i in range(n):
            mine, product = own[i][:count], products[i][start : start + count]
            large = 0
            for j in range(count):
                product[j] = mine[j] * total[j]
                large += abs(product[j]) > limit
            if large and taken + large <= len(places):
                k = taken
                for j in range(count):
                    if abs(product[j]) > limit:
                        places[k] = i * size + start + j
                        k += 1
            taken += large
    found[0] = taken


@kernel
def merge_competing(
    values: Any,
    base: Any,
    first: Any,
    ends: Any,
    tops: Any,
    weights: Any,
    scale: Any,
    powers: Any,
    agreements: Any,
    work: Any,
    out: Any,
) -> None:
    """Write the mean of clipped changes, weighted by their scores.

    Args:
        values: the models' values, ``[n, elements]``.
        base: the base's, ``[elements]``, or None where ``values`` are changes.
        first: the first element.
        ends: the ends of each model's magnitudes, ``[n, 2]`` float32.
        tops: the score from which each model's changes compete, and its greatest score, ``[n, 2]`` float32.
        weights: of each model, the factor of its changes, ``[n]`` float32.
        scale: the factor of the result.
        powers: one factor of the scores, ``[n, size]`` float32.
        agreements: the other factor of the scores, ``[n, size]`` float32.
        work: space, ``[3, CHUNK]`` float32.
        out: receives the merged elements, ``[size]`` float32.
    """
    n, size = powers.shape
    own, total, mass = work[0], work[1], work[2]
    times, least = float32(scale), float32(1e-12)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        for i in range(n):
            mine = own[:count]
            change_row(values[i], base, first + start, mine)
            low, high, cut, weight = ends[i, 0], ends[i, 1], tops[i, 0], weights[i]
            span = tops[i, 1] - cut if tops[i, 1] > cut else float32(numpy.inf)
            power, agreement = powers[i][start : start + count], agreements[i][start : start + count]
            for j in range(count):
                score = power[j] * agreement[j]
                share = ((score if score > cut else cut) - cut) / span  # max would keep a -0 next to a cut of 0
                part = min(max(abs(mine[j]), low), high) * _sign(mine[j]) * weight * share
                mass[j] = share if i == 0 else mass[j] + share
                total[j] = part if i == 0 else total[j] + part
        into = out[start : start + count]
        for j in range(count):
            into[j] = total[j] / max(mass[j], least) * times
