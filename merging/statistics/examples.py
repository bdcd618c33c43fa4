"""Examples on which statistics are gathered: texts of a file of JSON lines, or the images of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.errors import FormatError, InputError, OptionError, option
from merging.sources.links import check_inside
from merging.sources.small_files import parse_json

__all__ = ["StatisticsExample", "open_statistics_examples", "read_statistics_examples"]

_LINE_LIMIT = 1 << 24
"""The most bytes of one line."""

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True)
class StatisticsExample:
    """One example: a text, or the path of an image; its label and completion if the data state them.

    ``where`` is its file and line, for messages.
    """

    where: str
    text: str = ""
    image: Path | None = None
    label: Any = None
    completion: str | None = None


def open_statistics_examples(
    data: Path, most: int, column: str = "text", label_column: str | None = None
) -> Iterator[StatisticsExample]:
    """Read the first example at once, and return an iterator over at most ``most``.

    So data without any are refused before a model is loaded. Arguments and errors are the same as of
    :func:`read_statistics_examples`.
    """
    examples = read_statistics_examples(data, column, label_column)
    first = next(examples, None)
    if first is None:
        raise InputError(f"{data}: holds no examples")
    return islice(chain([first], examples), most)


def read_statistics_examples(
    data: Path, column: str = "text", label_column: str | None = None
) -> Iterator[StatisticsExample]:
    """Yield the examples of a file of JSON lines or texts (``.txt``, one a line), or of a folder of images, in order.

    Lines are read when they are asked for.

    Args:
        data: the file or folder.
        column: the field of the text.
        label_column: the field of the label; None where no label is needed.

    Raises:
        FormatError: for a line that is no example.
        InputError: for data that are not there.
        OptionError: for a folder of images with labels.
    """
    if data.is_dir():
        if label_column is not None:
            raise OptionError(f"{data}: images have no labels here: use {option('fisher', 'sampled')}")
        yield from _read_images(data)
        return
    for number, line in enumerate(_read_lines(data), 1):
        where = f"{data}, line {number}"
        if line.strip():
            yield _read_text(line, where) if data.suffix == ".txt" else _read_object(line, where, column, label_column)


def _read_lines(data: Path) -> Iterator[str]:
    try:
        with os.fdopen(os_calls.open_regular(data), "rb") as stream:
            number = 0
            while line := stream.readline(_LINE_LIMIT + 1):
                number += 1
                if len(line) > _LINE_LIMIT:
                    raise FormatError(f"{data}, line {number}: is longer than {_LINE_LIMIT >> 20} MiB")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise FormatError(f"{data}, line {number}: is not text in UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{data}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read_text(line: str, where: str) -> StatisticsExample:
    return StatisticsExample(where, line.strip())


def _read_object(line: str, where: str, column: str, label_column: str | None) -> StatisticsExample:
    try:
        values = parse_json(line, where)
    except FormatError as error:
        raise FormatError(
            f"{error}: give JSON lines, texts in a file that ends in .txt, or a folder of images"
        ) from None
    if column not in values:
        fields = ", ".join(map(repr, list(values)[:8])) or "none"
        raise FormatError(
            f"{where}: has no field {column!r}, and its fields are {fields}: name one with {option('column')}"
        )
    text = values[column]
    if not isinstance(text, str) or not text.strip():
        raise FormatError(f"{where}: {column} is {str(text)[:40]!r}, and should be a text")
    completion = values.get("completion")
    if label_column is None:
        return StatisticsExample(where, text, completion=completion if isinstance(completion, str) else None)
    return StatisticsExample(where, text, label=values.get(label_column), completion=completion)


def _read_images(folder: Path) -> Iterator[StatisticsExample]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
    if not paths:
        raise InputError(f"{folder}: holds no images ({', '.join(_IMAGES)})")
    for path in paths:
        check_inside(path, folder)
        yield StatisticsExample(str(path), image=path)
