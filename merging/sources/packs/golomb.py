"""Positions of few among many entries, stored as the gaps between them in a Golomb code.

If entries are kept with probability k, the gaps between them are geometric. For these, Golomb's code (1966) with a
power of two as divisor (Rice) is nearly the shortest: a gap is its quotient by 2^b in unary and its remainder in b
bits. All unary parts are stored together, and all remainders, so that both are read and written as whole arrays."""

from __future__ import annotations

from math import floor, log, log2, sqrt

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Bits",
    "Positions",
    "entropy",
    "mean_bits",
    "packed_bits",
    "parameter",
    "positions",
    "remainder_bytes",
    "streams",
]

Bits = NDArray[np.uint8]
Positions = NDArray[np.int64]

_GOLDEN = (1 + sqrt(5)) / 2

_MOST = 15
"""The largest useful remainder in bits: frames are no longer than that."""


def parameter(density: float) -> int:
    """Return the remainder's bits b* with the shortest mean code, if a share ``density`` of the entries is kept.

    ``max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - density))))`` with the golden ratio phi, as in ComPEFT (Yadav et al.
    2023, arXiv 2311.13171), and at most 15.
    """
    if density >= 1:
        return 0
    if density <= 2.0**-_MOST:
        return _MOST
    return min(_MOST, max(0, 1 + floor(log2(log(_GOLDEN - 1) / log(1 - density)))))


def mean_bits(density: float) -> float:
    """Return the expected bits of a gap: ``b* + 1 / (1 - (1 - density)^(2^b*))``."""
    b = parameter(density)
    return float(b + 1 / (1 - (1 - density) ** (1 << b)))


def entropy(density: float) -> float:
    """Return the least mean bits of an entry, if a share ``density`` of entries is kept with random signs."""
    rest = 1 - density
    kept = -density * log2(density / 2) if density > 0 else 0.0
    return kept - (rest * log2(rest) if rest > 0 else 0.0)


def remainder_bytes(count: int, b: int) -> int:
    """Return the bytes of the remainders of ``count`` gaps."""
    return (count * b + 7) // 8


def packed_bits(bits: NDArray[np.bool_]) -> Bits:
    """Return bits as bytes, the highest bit first, with zeros up to a whole byte."""
    return np.packbits(bits)


def streams(kept: Positions, b: int) -> tuple[Bits, Bits]:
    """Return the unary parts and the remainders of the gaps between ascending positions, the first counted from 0."""
    gaps = np.diff(kept, prepend=-1) - 1
    ends = np.cumsum((gaps >> b) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.bool_)
    unary[ends] = True
    remainders = np.empty((len(gaps), b), dtype=np.uint8)
    for place in range(b):
        remainders[:, place] = (gaps >> (b - 1 - place)) & 1
    return packed_bits(unary), packed_bits(remainders.reshape(-1).view(np.bool_))


def positions(unary: Bits, remainders: Bits, count: int, b: int, size: int) -> Positions:
    """Return the ``count`` ascending positions below ``size`` from which :func:`streams` made its streams.

    Raises ValueError for streams that hold anything else.
    """
    ends = np.flatnonzero(np.unpackbits(unary).view(np.bool_))
    if len(ends) != count or len(unary) != (int(ends[-1]) // 8 + 1 if count else 0):
        raise ValueError(f"holds {len(ends)} positions of {count}")
    gaps = (np.diff(ends, prepend=-1) - 1) << b
    if b:
        bits = np.unpackbits(remainders, count=count * b).reshape(count, b)
        for place in range(b):
            gaps |= bits[:, place].astype(np.int64) << (b - 1 - place)
    found = np.cumsum(gaps + 1) - 1
    if count and int(found[-1]) >= size:
        raise ValueError(f"holds the position {int(found[-1])} of {size}")
    return found
