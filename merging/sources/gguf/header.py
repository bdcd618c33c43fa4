"""The header of a GGUF file: its key-value pairs and its tensors, checked in full before a value is trusted.

The format is llama.cpp's: a magic number, a version, two counts, the pairs, the descriptions of the tensors, and then
the tensors' bytes, each at a multiple of the alignment."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.gguf.tensor_types import BlockType, block_type
from merging.sources.open_files import File

__all__ = ["GgufHeader", "GgufTensorInfo", "count_in", "read_gguf_header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_CHUNK = 1 << 20
_MAX_TENSORS, _MAX_PAIRS = 1 << 20, 1 << 16
_MAX_KEY, _MAX_NAME, _MAX_STRING = 1 << 16, 1 << 8, 1 << 26  # bytes
_MAX_AXES = 4
_MAX_KEPT = 1 << 12
"""Longer arrays, such as the list of tokens, are checked and not kept."""
_MAX_ALIGNMENT = 1 << 16
_MAX_COUNT = 2**62

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """One tensor of the file: its type, its shape as torch has it, and its position in bytes."""

    kind: BlockType
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.elements * self.kind.nbytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The content of a file: tensors by name, and metadata: strings as they are, all else as JSON."""

    tensors: dict[str, GgufTensorInfo]
    metadata: dict[str, str]


def read_gguf_header(file: File) -> GgufHeader:
    """Read and check the header of an open GGUF file.

    Raises:
        FormatError: for anything but a complete and well-formed file.
        InputError: for quantised tensors where the package gguf is not installed.
    """
    try:
        return _read(_Cursor(file))
    except _Fault as fault:
        raise FormatError(f"{file.path}: {fault}") from None


def count_in(text: str) -> int | None:
    """Return the count that a text of the metadata states, None for a text that is not one of up to nine digits."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


class _Fault(Exception):
    """A fault of the file, without its name."""


class _Cursor:
    """Reads a file from the beginning, never beyond its end."""

    def __init__(self, file: File) -> None:
        self.path: Path = file.path
        self.size = file.size
        self.at = 0
        self._file = file
        self._chunk, self._first = b"", 0

    def take(self, count: int, what: str) -> bytes:
        """Return the next ``count`` bytes."""
        if count > self.size - self.at:
            raise _Fault(f"truncated or damaged: it ends within {what}: download it again")
        begin = self.at - self._first
        if begin + count > len(self._chunk):
            room = bytearray(min(max(count, _CHUNK), self.size - self.at))
            self._file.read(memoryview(room), self.at)
            self._chunk, self._first, begin = bytes(room), self.at, 0
        self.at += count
        return self._chunk[begin : begin + count]

    def skip(self, count: int, what: str) -> None:
        """Pass over bytes."""
        if count > self.size - self.at:
            raise _Fault(f"truncated or damaged: it ends within {what}: download it again")
        self.at += count
        self._chunk, self._first = b"", self.at

    def number(self, code: str, what: str) -> Any:
        """Return the next number of a type of :mod:`struct`."""
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))
        return value

    def count(self, most: int, what: str) -> int:
        """Return the next count, which may not be larger than ``most``."""
        value = int(self.number("Q", what))
        if value > most:
            raise _Fault(f"damaged: {what} is {value:,}, and at most {most:,} are read")
        return value

    def text(self, most: int, what: str) -> str:
        """Return the next string."""
        raw = self.take(self.count(most, f"the length of {what}"), what)
        return raw.decode(errors="replace")


def _read(cursor: _Cursor) -> GgufHeader:
    if cursor.size < 24 or cursor.take(4, "its first bytes") != _MAGIC:
        raise _Fault("is not a GGUF file, or not all of one: it does not begin with GGUF: download it again")
    version = cursor.number("I", "its version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        why = "its bytes are in big-endian order" if swapped else f"its version of the format is {version:,}"
        raise _Fault(f"{why}, and little-endian files of versions 2 and 3 are read: convert the model again")
    tensors = cursor.count(_MAX_TENSORS, "the number of its tensors")
    pairs = cursor.count(_MAX_PAIRS, "the number of its metadata entries")
    metadata = _read_pairs(cursor, pairs)
    alignment = _alignment(metadata)
    described = [_read_tensor(cursor) for _ in range(tensors)]
    data = -(-cursor.at // alignment) * alignment
    found: dict[str, GgufTensorInfo] = {}
    for name, kind, shape, offset in described:
        if name in found:
            raise _Fault(f"damaged: it holds {name!r} twice")
        if offset % alignment:
            raise _Fault(f"damaged: {name!r} begins at {offset:,}, which is not a multiple of {alignment}")
        found[name] = GgufTensorInfo(kind, shape, data + offset)
    _check_places(found, cursor.size)
    return GgufHeader(found, metadata)


def _read_pairs(cursor: _Cursor, count: int) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for _ in range(count):
        key = cursor.text(_MAX_KEY, "a key of its metadata")
        kept, value = _read_value(cursor, cursor.number("I", f"the type of {key[:80]!r}"), key)
        if key in metadata:
            raise _Fault(f"damaged: its metadata has the key {key[:80]!r} twice")
        if kept:
            metadata[key] = value if isinstance(value, str) else json.dumps(value)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> tuple[bool, Any]:
    """Return whether a value is kept, and the value."""
    what = repr(key[:80])
    if kind == _STRING:
        return True, cursor.text(_MAX_STRING, what)
    if kind in _SCALARS:
        return True, cursor.number(_SCALARS[kind], what)
    if kind != _ARRAY:
        raise _Fault(f"damaged: {what} has the type {kind}, which GGUF does not have")
    inner, length = cursor.number("I", what), cursor.count(_MAX_COUNT, f"the length of {what}")
    if inner == _STRING:
        if length * 8 > cursor.size - cursor.at:  # each has a length at least
            raise _Fault(f"truncated or damaged: {what} would have {length:,} strings: download it again")
        texts = [cursor.text(_MAX_STRING, what) for _ in range(length)]
        return length <= _MAX_KEPT, texts
    if inner not in _SCALARS:
        raise _Fault(f"{what} is an array of the type {inner}, which is not read")
    size = struct.calcsize("<" + _SCALARS[inner])
    if length > _MAX_KEPT:
        cursor.skip(length * size, what)
        return False, None
    return True, list(struct.unpack(f"<{length}{_SCALARS[inner]}", cursor.take(length * size, what)))


def _alignment(metadata: dict[str, str]) -> int:
    stated = metadata.get("general.alignment", "32")
    alignment = count_in(stated)
    if not alignment or alignment > _MAX_ALIGNMENT or alignment % 8:
        raise _Fault(f"damaged: its alignment is {stated[:40]}, which is not a multiple of 8")
    return alignment


def _read_tensor(cursor: _Cursor) -> tuple[str, BlockType, tuple[int, ...], int]:
    name = cursor.text(_MAX_NAME, "the name of a tensor")
    axes = cursor.number("I", f"the shape of {name!r}")
    if axes > _MAX_AXES:
        raise _Fault(f"damaged: {name!r} has {axes:,} axes, and at most {_MAX_AXES} are read")
    sizes = struct.unpack(f"<{axes}Q", cursor.take(8 * axes, f"the shape of {name!r}"))
    number = cursor.number("I", f"the type of {name!r}")
    offset = cursor.number("Q", f"the place of {name!r}")
    kind = block_type(number)
    if kind is None:
        raise _Fault(f"{name!r} has the type {number}, which GGUF does not have, or not any more")
    if not 0 < math.prod(sizes) <= _MAX_COUNT:
        raise _Fault(f"damaged: {name!r} has the impossible shape {list(sizes)}")
    row = sizes[0] if sizes else 1
    if row % kind.elements:
        raise _Fault(f"damaged: the rows of {name!r} have {row:,} elements, no multiple of {kind.name}'s block")
    return name, kind, tuple(reversed(sizes)), offset


def _check_places(tensors: dict[str, GgufTensorInfo], size: int) -> None:
    """Refuse tensors that overlap, or end behind the end of the file."""
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise _Fault(f"damaged: {name!r} overlaps {before!r}")
        end, before = info.start + info.nbytes, name
        if end > size:
            raise _Fault(
                f"truncated or damaged: {name!r} ends at byte {end:,}, and the file has {size:,}: download it again"
            )
