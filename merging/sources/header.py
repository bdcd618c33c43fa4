"""The header of a safetensors file, read and checked in full before a single byte of a tensor is trusted.

A file is 8 bytes of little-endian length N, N bytes of UTF-8 JSON, then the data. For every tensor, the JSON states a
dtype, a shape and a range of bytes; a file is accepted only if these ranges tile the data exactly."""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

from merging.errors import FormatError
from merging.sources.garbage import pause_collection
from merging.sources.stamp import Stamp, stamp_of

__all__ = ["DTYPE_BITS", "Header", "HeaderEntry", "header_length", "parse_header", "read_header"]

# Bits per element. F4 and F6 elements share bytes, so that only whole tensors have a size in bytes.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_MAX_HEADER = 100_000_000  # bytes, as in the reference reader
_MAX_TENSORS = 2**20
_MAX_NAME = 4096  # bytes
_MAX_RANK = 64  # torch and numpy go no further; without a limit, the product of a long shape takes hours
_MAX_DEPTH = 120  # of fields that nobody knows
_MAX_COUNT = 2**63 - 1  # what torch can hold as a dimension or an offset

# How files of other kinds begin, and what to advise their owner.
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file: run git lfs pull"),
    (b"<", "is an HTML or XML page, not the file: its download was refused or redirected, download it again"),
    (b"PK\x03\x04", "is a zip archive (a PyTorch checkpoint?), not a safetensors file: convert it first"),
    (b"\x80", "is a pickle (a PyTorch checkpoint?), not a safetensors file: convert it first"),
    (b"GGUF", "is a GGUF file, not a safetensors file: convert it first"),
    (b"{", "is JSON text, not a safetensors file: was an index or an error message saved under its name?"),
)

# Values of the file go into messages escaped and shortened: they may be hostile, and megabytes long.
_shorten = reprlib.Repr()
_shorten.maxstring = 160
_shorten.maxlist = 8


class HeaderEntry(NamedTuple):
    """One tensor of a file: its safetensors dtype ("BF16"), shape, and position in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a file: its tensors by name in order of offset, its metadata, and its size in bytes.

    ``stamp`` identifies the file and its state, if the header was read from a file.
    """

    entries: dict[str, HeaderEntry]
    metadata: dict[str, str]
    size: int
    stamp: Stamp | None = None


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file at `path`; its tensors stay unread.

    Raises FormatError if the file cannot be read or is anything but a complete and well-formed safetensors file.
    """
    where = str(path)
    try:
        # Before opening: opening a pipe would wait for its writer.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
            raise FormatError(f"{where}: {kind}, not a safetensors file")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            length = header_length(file.read(64), status.st_size, where)
            file.seek(8)
            raw = file.read(length)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FormatError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) < length:
        raise FormatError(f"{where}: became shorter while it was read")
    return replace(parse_header(raw, status.st_size, where), stamp=stamp_of(status))


def header_length(head: bytes, size: int, where: str) -> int:
    """Return the length of the JSON header in bytes, from the first bytes of a file of `size` bytes.

    `head` needs 8 bytes; with 64, a file of another kind is also recognised and named. Raises FormatError, its message
    starting with `where`, if the length is impossible.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) >= 8 and 0 < length <= min(_MAX_HEADER, size - 8):
        return length
    raise FormatError(f"{where}: {_impossible(head, length, size)}")


def parse_header(raw: bytes, size: int, where: str) -> Header:
    """Check the JSON header `raw` of a file of `size` bytes, and return its content.

    `raw` is the whole header without the 8 bytes of its length, which `header_length` reads. Raises FormatError, its
    message starting with `where`, at the first fault.
    """
    data = 8 + len(raw)
    try:
        with pause_collection():
            document = _document(raw)
            metadata = _metadata(document.pop("__metadata__", None))
            entries = _entries(document, data)
            _check_tiling(entries, data, size)
    except ValueError as fault:  # the functions below say what is wrong, this one says in which file
        raise FormatError(f"{where}: {fault}") from None
    return Header(entries, metadata, size)


def _impossible(head: bytes, length: int, size: int) -> str:
    """Return the clearest reason why this file cannot have a header of `length` bytes."""
    if not size:
        return "is empty (0 bytes): download it again"
    if size < 8 or len(head) < 8:
        return f"has {size} bytes, too few for a safetensors file: download it again"
    if not length:
        return "begins with zeros where the length of its header belongs, an unfinished download: download it again"
    if length <= _MAX_HEADER:
        return f"truncated: its header alone takes {length:,} bytes, the file has {size:,}: download it again"
    # Only now: the low bytes of a possible length may spell anything.
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, message in _IMPOSTORS:
        if start.startswith(magic):
            return message
    return f"not a safetensors file, or damaged: its header would take {length:,} bytes (limit {_MAX_HEADER:,})"


def _document(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of the header, without further checks."""
    # Counted before parsing, which would take some gigabytes: an entry needs a brace.
    if raw.count(b"{") > _MAX_TENSORS:
        raise ValueError(f"the header lists more than {_MAX_TENSORS:,} tensors")
    try:
        text = raw.decode()  # given bytes, json would also take UTF-16 and UTF-32
        document = json.loads(text, parse_constant=_refuse_constant)
        if not _has_all_strings(document, text):
            document = json.loads(text, object_pairs_hook=_pairs, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("the header is nested too deeply to be one") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the header is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"the header is not JSON: {error}") from None
    return _mapping(document, "the header")


def _has_all_strings(document: object, text: str) -> bool:
    """Return whether a header of plain entries has all strings of its text, each with two quotes.

    Of a repeated key json keeps the last value alone. The answer is no where the text has escapes, or entries have
    other fields than usual.
    """
    if "\\" in text or not isinstance(document, dict):
        return False
    strings = 0
    for name, value in document.items():
        if type(value) is not dict or (name != "__metadata__" and len(value) != 3):
            return False
        strings += 1 + 2 * len(value) if name == "__metadata__" else 5  # the name, three keys, and the dtype
    return text.count('"') == 2 * strings


def _pairs(pairs: list[tuple[str, Any]]) -> object:
    """Return a JSON object as a dict, or as the tuple of its pairs (no other JSON value is one) if it repeats a key."""
    unique = dict(pairs)
    return unique if len(unique) == len(pairs) else tuple(pairs)


def _mapping(value: object, what: str) -> dict[str, Any]:
    """Return `value` if it is a dict. Of a repeated key, other readers silently keep the last value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, tuple):
        [(repeated, _)] = Counter(key for key, _ in value).most_common(1)
        raise ValueError(f"{what} has the key {_shorten.repr(repeated)} more than once")
    raise ValueError(f"{what} is {_shorten.repr(value)}, not a JSON object")


def _refuse_constant(literal: str) -> object:
    raise ValueError(f"{literal} is not a JSON value")


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    metadata = _mapping(value, "__metadata__")
    for key, text in metadata.items():
        if type(text) is not str:
            raise ValueError(f"__metadata__ maps {_shorten.repr(key)} to {_shorten.repr(text)}, not to a string")
        _utf8(key)
        _utf8(text)
    return metadata


def _utf8(text: str) -> bytes:
    r"""Return `text` as UTF-8 bytes. JSON can also spell half a character, ``"\ud800"``, which is refused."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{_shorten.repr(text)} is not valid Unicode") from None


def _entries(document: dict[str, Any], data: int) -> dict[str, HeaderEntry]:
    """Return the tensors of the header in order of offset, each checked alone; the data starts at byte `data`."""
    entries, name = {}, ""
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    try:
        for name, fields in document.items():
            _check_name(name)
            entries[intern(name)] = _entry(fields, data, shapes)  # models of one kind share their names
    except ValueError as fault:
        raise ValueError(f"tensor {_shorten.repr(name)}: {fault}") from None
    return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))


def _check_name(name: str) -> None:
    length = len(_utf8(name))
    if length > _MAX_NAME:
        raise ValueError(f"its name has {length:,} bytes (limit {_MAX_NAME:,})")
    if "\0" in name:
        raise ValueError("its name contains NUL")


def _entry(fields: object, data: int, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> HeaderEntry:
    """Return one checked tensor; it shares its shape with tensors in ``shapes``."""
    fields = _mapping(fields, "its entry")
    try:
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    except KeyError as missing:
        raise ValueError(f"{missing} is missing") from None
    if len(fields) > 3:
        _check_more(fields)
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {_shorten.repr(dtype)}")
    shape, offsets = _counts(shape, "shape"), _counts(offsets, "data_offsets")
    shape = shapes.setdefault(shape, shape)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {_shorten.repr([*offsets])} are not a start and an end")
    start, end = offsets
    bits = DTYPE_BITS[dtype] * _elements(shape)
    if bits % 8:
        raise ValueError(f"{dtype} of shape {[*shape]} does not fill whole bytes")
    if bits != 8 * (end - start):
        raise ValueError(f"{dtype} of shape {[*shape]} does not fit the {end - start:,} bytes that it is given")
    return HeaderEntry(dtype, shape, data + start, end - start)


def _check_more(fields: dict[str, Any]) -> None:
    """Refuse fields that readers in other languages cannot parse: deep nesting, huge numbers."""
    level: list[Any] = [fields]
    for _ in range(_MAX_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        values = [value for each in inner for value in each]
        for text in [key for each in level if isinstance(each, dict) for key in each] + values:
            if isinstance(text, str):
                _utf8(text)
        if any(isinstance(value, (int, float)) and not abs(value) < 1e308 for value in values):
            raise ValueError("its entry holds a number that is too large")
        level = [value for value in values if isinstance(value, (dict, list, tuple))]
    if level:
        raise ValueError("its entry is nested too deeply")


def _counts(value: object, field: str) -> tuple[int, ...]:
    """Return a JSON list of sizes; `type` and not `isinstance` is compared, because true is not a size."""
    if type(value) is not list or len(value) > _MAX_RANK:
        raise ValueError(f"{field} {_shorten.repr(value)} is not a list of at most {_MAX_RANK} integers")
    for count in value:
        if type(count) is not int or not 0 <= count <= _MAX_COUNT:
            raise ValueError(f"{field} {_shorten.repr(value)} does not hold integers from 0 to 2**63 - 1 only")
    return tuple(value)


def _elements(shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    # torch works out the strides of an empty tensor too.
    if not count and math.prod(filter(None, shape)) > _MAX_COUNT:
        raise ValueError(f"shape {[*shape]} is too large, even with no elements")
    return count


def _check_tiling(entries: dict[str, HeaderEntry], data: int, size: int) -> None:
    """Refuse holes, overlaps, missing and surplus bytes: a byte of the data belongs to exactly one tensor."""
    end, before = data, ""
    for name, entry in entries.items():
        if entry.start < end:
            raise ValueError(f"tensor {_shorten.repr(name)} overlaps tensor {_shorten.repr(before)}")
        if entry.start > end:
            raise ValueError(f"tensor {_shorten.repr(name)} leaves a hole of {entry.start - end:,} bytes before it")
        end, before = entry.start + entry.nbytes, name
    if end > size:
        raise ValueError(f"truncated: has {size:,} bytes of {end:,}: download it again")
    if end < size:
        raise ValueError(f"has {size - end:,} bytes after its last tensor: it is damaged or not what it claims to be")
