"""The only reader of small files: configs, indexes, tokenizers, cards, recipes, manifests.

All of them may come from strangers. Only regular files are read (a pipe would block, a device never end), up to a
stated size, and never through a link out of their folder."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.errors import FormatError, InputError
from merging.sources.links import check_inside, check_open_file

__all__ = [
    "DATA_LIMIT",
    "LIST_LIMIT",
    "RECIPE_LIMIT",
    "TEXT_LIMIT",
    "check_file",
    "copy_file",
    "decode_text",
    "is_there",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_json_list",
    "read_text",
]

TEXT_LIMIT = 1 << 23
"""The largest size in bytes of a config or a model card."""

RECIPE_LIMIT = 1 << 20
"""The largest size in bytes of a recipe, which is parsed slowly, since its errors state lines."""

LIST_LIMIT = 1 << 26
"""The largest size in bytes of a list of tensors, tokens or steps: an index, a tokenizer's file, a store's manifest."""

DATA_LIMIT = 1 << 30
"""The largest size in bytes of a user's examples and texts."""

_CONTAINERS = 1 << 21
"""The largest number of lists and objects in one JSON text; each takes a hundred bytes of memory for two characters."""

_DEPTH = 64
"""How deep JSON may be nested."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Possible halves of characters in JSON."""

_BLOCK = 1 << 22


def is_there(path: Path, limit: int | None = LIST_LIMIT) -> bool:
    """Whether a file exists in a model's folder. Weights have no ``limit``.

    Raises :class:`~merging.errors.FormatError` as :func:`check_file` does.
    """
    return os.path.lexists(path) and bool(check_file(path, limit=limit))


def check_file(path: Path, folder: Path | None = None, limit: int | None = LIST_LIMIT) -> Path:
    """Return the path of a file that may be read: a regular file, not too large, and no link out of ``folder``.

    ``folder`` is by default the file's own. Raises :class:`~merging.errors.FormatError` for any other file.
    """
    check_inside(path, folder or path.parent)
    try:
        status = path.stat()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path}: is {os_calls.kind_of(status.st_mode)}, and should be a file")
    if limit is not None:
        _check_size(path, status.st_size, limit)
    return path


def read_bytes(path: Path, limit: int = TEXT_LIMIT, *, given: bool = False) -> bytes:
    """Return the content of a small file. A ``given`` file was named by the user, and may be a link to anywhere.

    Raises :class:`~merging.errors.FormatError` for a file that is not regular, is larger than ``limit`` bytes, or is a
    link out of its folder, and :class:`~merging.errors.InputError` for a file that cannot be read.
    """
    if not given:
        check_inside(path, path.parent)
    try:
        with os.fdopen(os_calls.open_regular(path), "rb") as stream:
            if not given:
                check_open_file(stream.fileno(), path, path.parent)
            _check_size(path, os.fstat(stream.fileno()).st_size, limit)
            content = stream.read(limit + 1)  # some files of the system state no size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    _check_size(path, len(content), limit)
    return content


def read_text(path: Path, limit: int = TEXT_LIMIT, *, given: bool = False, errors: str = "strict") -> str:
    """Return the text of a small file. Raises as :func:`read_bytes` does, and for a text that is not UTF-8."""
    return decode_text(read_bytes(path, limit, given=given), str(path), limit, errors)


def decode_text(content: bytes, where: str, limit: int = TEXT_LIMIT, errors: str = "strict") -> str:
    """Return the text of bytes; ``where`` is their place in messages.

    Raises :class:`~merging.errors.FormatError` for more than ``limit`` bytes, and for a text that is not UTF-8.
    """
    _check_size(where, len(content), limit)
    try:
        text = content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: is not text in UTF-8: {error.reason} at byte {error.start}") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, limit: int = TEXT_LIMIT, *, given: bool = False, halves: bool = False) -> dict[str, Any]:
    """Return a JSON object from a file. Raises as :func:`read_text` and :func:`parse_json` do."""
    return parse_json(read_text(path, limit, given=given), str(path), halves=halves)


def read_json_list(path: Path) -> list[Any]:
    """Return a JSON list from a file. Raises as :func:`read_json` does."""
    value = _parse(read_text(path), str(path), False)
    if not isinstance(value, list):
        raise FormatError(f"{path}: should hold a JSON list, and holds a {type(value).__name__}")
    return value


def parse_json(text: str, where: str, *, halves: bool = False) -> dict[str, Any]:
    """Return a JSON object from a text; ``where`` is its place in messages.

    Raises :class:`~merging.errors.FormatError` for anything else, and for a text that would take far more memory than
    its size. Halves of characters, which JSON can spell and no file can hold, are refused too, unless ``halves`` allows
    them: Python keeps odd bytes of paths in them.
    """
    value = _parse(text, where, halves)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: should hold a JSON object, and holds a {type(value).__name__}")
    return value


def _parse(text: str, where: str, halves: bool) -> Any:
    if text.count("[") + text.count("{") > _CONTAINERS:
        raise FormatError(f"{where}: holds more than {_CONTAINERS:,} lists and objects")
    try:
        value = json.loads(text)
        if not halves and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{where}: holds half a character, which is not valid Unicode") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: is not valid JSON: {str(error).splitlines()[0]}") from None
    if isinstance(value, (dict, list)) and _is_deep(value):
        raise FormatError(f"{where}: is nested too deeply")
    return value


def copy_file(source: Path, target: Path, folder: Path | None = None) -> None:
    """Copy a file that :func:`check_file` has accepted for this folder to a new file.

    Raises OSError, and :class:`~merging.errors.FormatError` if a link out of the folder has replaced the file since.
    """
    with os.fdopen(os_calls.open_regular(source), "rb") as reader, os_calls.create(target) as writer:
        check_open_file(reader.fileno(), source, folder or source.parent)
        while block := reader.read(_BLOCK):
            writer.write(block)


def _check_size(path: Path | str, size: int, limit: int) -> None:
    if size > limit:
        raise FormatError(f"{path}: is larger than {limit >> 20} MiB, which no such file is")


def _is_deep(value: object) -> bool:
    """Whether a JSON value is nested so deeply that it could be read, but not written or shown."""
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for values in inner for each in values if isinstance(each, (dict, list))]
        if not level:
            return False
    return True
