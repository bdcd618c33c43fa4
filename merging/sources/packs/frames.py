"""Sparse tensors in frames of 2^15 entries; every frame can be decoded alone.

A payload begins with an index of eight bytes a frame: the number of kept entries, the bytes of the unary parts, and a
checksum. The frames follow: positions (:mod:`~merging.sources.packs.golomb`, or two bitmaps, of the positive and the
negative entries), and the entries unless bitmaps say all: signs, or codes of a byte at one scale a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.packs.golomb import Bits, Positions, packed_bits, positions, remainder_bytes, streams
from merging.sources.packs.grouped import group_bytes, pack_groups, unpack_groups

__all__ = ["BITMAP", "FRAME", "Frames", "Holds", "frame_signs", "frame_values", "index_bytes"]

FRAME = 1 << 15
"""Entries in a frame."""

BITMAP = -1
"""A value in the place of the remainder's bits: positions and signs are two bitmaps."""

Holds = Literal["signs", "values"]
"""The information stored about kept entries."""

_INDEX = np.dtype([("kept", "<u2"), ("unary", "<u2"), ("checksum", "<u4")])


def index_bytes(size: int) -> int:
    """Return the bytes of the index of a tensor of ``size`` entries: no payload is shorter."""
    return -(-size // FRAME) * _INDEX.itemsize


def frame_signs(signs: Tensor, b: int) -> Tensor:
    """Return a payload of signs (int8, flat: -1, 0 or 1): gaps with remainders of ``b`` bits, or bitmaps."""
    flat = signs.numpy()

    def frame(first: int, kept: Positions) -> tuple[int, bytes]:
        positive = flat[first + kept] > 0
        if b == BITMAP:
            size = min(FRAME, len(flat) - first)
            return 0, b"".join(_bitmap(kept[chosen], size).tobytes() for chosen in (positive, ~positive))
        unary, remainders = streams(kept, b)
        return len(unary), unary.tobytes() + remainders.tobytes() + packed_bits(positive).tobytes()

    return _payload(np.flatnonzero(flat), len(flat), frame)


def frame_values(values: Tensor, kept: Tensor, b: int, unit: float) -> Tensor:
    """Return a payload of some of the values (float32, flat) at ascending positions, in codes of a byte."""

    def frame(first: int, here: Positions) -> tuple[int, bytes]:
        unary, remainders = streams(here, b)
        if not len(here):
            return 0, b""
        codes = pack_groups(values[torch.from_numpy(first + here)][None], 8, unit)
        return len(unary), unary.tobytes() + remainders.tobytes() + codes.numpy().tobytes()

    return _payload(kept.numpy(), len(values), frame)


def _bitmap(kept: Positions, size: int) -> Bits:
    bits = np.zeros(size, dtype=np.bool_)
    bits[kept] = True
    return packed_bits(bits)


def _payload(kept: Positions, size: int, frame: Callable[[int, Positions], tuple[int, bytes]]) -> Tensor:
    starts = range(0, size, FRAME)
    bounds = np.searchsorted(kept, [*starts, size])
    index = np.zeros(len(starts), dtype=_INDEX)
    parts = []
    for number, first in enumerate(starts):
        here = kept[bounds[number] : bounds[number + 1]] - first
        unary, data = frame(first, here)
        index[number] = (len(here), unary, crc32(data))
        parts.append(data)
    return (
        torch.frombuffer(bytearray(b"".join([index.tobytes(), *parts])), dtype=torch.uint8)
        if parts
        else torch.empty(0, dtype=torch.uint8)
    )


class Frames:
    """The frames of a payload of ``size`` entries; ``read`` returns its bytes from one offset to another.

    Raises ValueError for a damaged payload, at once or when frames are decoded.
    """

    def __init__(self, read: Callable[[int, int], Bits], nbytes: int, size: int, b: int, holds: Holds) -> None:
        self._read, self._size, self._b, self._holds = read, size, b, holds
        self._index = read(0, index_bytes(size)).view(_INDEX)
        ends = np.cumsum([self._frame_bytes(number) for number in range(len(self._index))], dtype=np.int64)
        self._bounds = np.concatenate([[0], ends]) + index_bytes(size)
        if int(self._bounds[-1]) != nbytes:
            raise ValueError(f"should have {int(self._bounds[-1])} bytes, and has {nbytes}")

    def _size_of(self, number: int) -> int:
        return min(FRAME, self._size - number * FRAME)

    def _frame_bytes(self, number: int) -> int:
        kept, unary, _ = (int(each) for each in self._index[number])
        if self._b == BITMAP:
            return 2 * -(-self._size_of(number) // 8)
        entries = -(-kept // 8) if self._holds == "signs" else group_bytes(1, kept, 8) if kept else 0
        return unary + remainder_bytes(kept, self._b) + entries

    def within(self, start: int, stop: int) -> Iterator[tuple[int, Positions, Bits]]:
        """Yield, for every frame between two entries, its first entry, the kept positions, and the bytes after them."""
        for number in range(start // FRAME, -(-stop // FRAME)):
            data = self._read(int(self._bounds[number]), int(self._bounds[number + 1]))
            kept, unary, checksum = (int(each) for each in self._index[number])
            if crc32(data.tobytes()) != checksum:
                raise ValueError("its checksum does not agree")
            size = self._size_of(number)
            if self._b == BITMAP:
                yield number * FRAME, *_from_bitmaps(data, kept, size)
                continue
            rest = unary + remainder_bytes(kept, self._b)
            yield number * FRAME, positions(data[:unary], data[unary:rest], kept, self._b, size), data[rest:]

    def signs(self, start: int, stop: int) -> Iterator[tuple[Positions, NDArray[np.bool_]]]:
        """Yield the kept positions between two entries, frame by frame, and whether each is positive."""
        for first, kept, data in self.within(start, stop):
            positive = np.unpackbits(data, count=len(kept)).astype(np.bool_)
            yield self._crop(first + kept, positive, start, stop)

    def values(self, start: int, stop: int, unit: float) -> Iterator[tuple[Positions, NDArray[np.float32]]]:
        """Yield the kept positions between two entries, frame by frame, and their values."""
        for first, kept, data in self.within(start, stop):
            if len(kept):
                found = unpack_groups(torch.from_numpy(data), 1, len(kept), 8, unit)[0].numpy()
                yield self._crop(first + kept, found, start, stop)

    @staticmethod
    def _crop(kept: Positions, entries: NDArray[np.generic], start: int, stop: int) -> tuple[Positions, NDArray[Any]]:
        here = slice(*np.searchsorted(kept, [start, stop]))
        return kept[here], entries[here]


def _from_bitmaps(data: Bits, count: int, size: int) -> tuple[Positions, Bits]:
    positive, negative = (np.unpackbits(each, count=size).astype(np.bool_) for each in np.split(data, 2))
    kept = np.flatnonzero(positive | negative)
    if len(kept) != count or bool((positive & negative).any()):
        raise ValueError(f"holds {len(kept)} positions of {count}")
    return kept, packed_bits(positive[kept])
