"""Positions of few among many entries, as the gaps between them in a Golomb code.

Gaps between entries that are kept with probability k are geometric, and Golomb's code (1966) with a divisor that is a
power of two (Rice) is nearly their shortest: a gap is its quotient by 2^b in unary and its remainder in b bits. All
unary parts stand together, and all remainders, so that both are read and written as whole arrays.
"""

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
"""The largest remainder in bits that is of use: frames are no longer than that."""


def parameter(density: float) -> int:
    """The remainder's bits b* that make the mean code shortest where a share ``density`` of the entries is kept.

    ``max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - density))))`` with the golden ratio phi, as in ComPEFT (Yadav et al.
    2023, arXiv 2311.13171), and at most 15.
    """
    if density >= 1:
        return 0
    if density <= 2.0**-_MOST:
        return _MOST
    return min(_MOST, max(0, 1 + floor(log2(log(_GOLDEN - 1) / log(1 - density)))))


def mean_bits(density: float) -> float:
    """The expected bits of a gap: ``b* + 1 / (1 - (1 - density)^(2^b*))``."""
    b = parameter(density)
    return float(b + 1 / (1 - (1 - density) ** (1 << b)))


def entropy(density: float) -> float:
    """The fewest bits an entry of which a share ``density`` is kept with a random sign can take on average."""
    rest = 1 - density
    kept = -density * log2(density / 2) if density > 0 else 0.0
    return kept - (rest * log2(rest) if rest > 0 else 0.0)


def remainder_bytes(count: int, b: int) -> int:
    """The bytes of the remainders of so many gaps."""
    return (count * b + 7) // 8


def packed_bits(bits: NDArray[np.bool_]) -> Bits:
    """Bits, the highest of each byte first, and zeros up to a whole byte."""
    return np.packbits(bits)


def streams(kept: Positions, b: int) -> tuple[Bits, Bits]:
    """The unary parts and the remainders of the gaps between ascending positions, the first counted from 0."""
    gaps = np.diff(kept, prepend=-1) - 1
    ends = np.cumsum((gaps >> b) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.bool_)
    unary[ends] = True
    remainders = np.empty((len(gaps), b), dtype=np.uint8)
    for place in range(b):
        remainders[:, place] = (gaps >> (b - 1 - place)) & 1
    return packed_bits(unary), packed_bits(remainders.reshape(-1).view(np.bool_))


def positions(unary: Bits, remainders: Bits, count: int, b: int, size: int) -> Positions:
    """What :func:`streams` made its streams of: so many ascending positions below ``size``.

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
