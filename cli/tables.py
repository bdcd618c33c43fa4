"""Columns of text that follow the width of the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

from merging.errors import escape_unprintable

from .output import echo, terminal_width

__all__ = [
    "column_widths",
    "echo_paragraph",
    "echo_table",
    "format_groups",
    "format_legend",
    "format_rows",
    "list_width",
]

_GAP = 2
"""Spaces between two columns."""

_NARROWEST = 12
_WIDEST = 118
"""Characters of a line of a list in a file or a pipe."""


def list_width() -> int:
    """Return the characters that a line of a list may take."""
    return terminal_width() or _WIDEST


def format_groups(groups: Mapping[str, Sequence[Sequence[str]]], last_columns: Sequence[str]) -> list[str]:
    """Return rows as lines under the titles of their groups; a title's line names the last columns too."""
    header = ["", *[""] * (len(next(iter(groups.values()))[0]) - len(last_columns)), *last_columns]
    indented = {title: [("", *row) for row in rows] for title, rows in groups.items()}
    widths = column_widths([header, *chain.from_iterable(indented.values())], list_width())
    first = len(widths) - len(last_columns)
    title_width = sum(widths[:first]) + _GAP * (first - 1)
    lines: list[str] = []
    for title, rows in indented.items():
        lines += format_rows([(title, *last_columns)], [title_width, *widths[first:]])
        lines += [*format_rows(rows, widths), ""]
    return lines


def format_legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Return words and their meanings in two columns."""
    return format_rows(entries, column_widths(entries, list_width()))


def column_widths(rows: Sequence[Sequence[str]], most: int | None) -> list[int]:
    """Return the width of each column, the widest narrowed until a row takes at most ``most`` characters."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while most and sum(widths) + _GAP * (len(widths) - 1) > most and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return widths


def format_rows(rows: Sequence[Sequence[str]], widths: Sequence[int], flush_right: Sequence[int] = ()) -> list[str]:
    """Return rows as lines, with every cell wrapped to its column's width, and some columns flush right."""
    lines = []
    for row in rows:
        cells = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = (
                part.rjust(width) if place in flush_right else part.ljust(width)
                for place, (part, width) in enumerate(zip(parts, widths, strict=True))
            )
            lines.append((" " * _GAP).join(padded).rstrip())
    return lines


def _wrap(cell: str, width: int) -> list[str]:
    """Return the lines of a cell. Ends of lines in it are escaped, so that no name of a file makes up lines."""
    text = escape_unprintable(cell)
    return [text] if len(text) <= width else textwrap.wrap(text, max(width, 1), break_on_hyphens=False)


def echo_paragraph(text: str) -> None:
    """Print a sentence, on several lines if the terminal is narrower."""
    width = terminal_width()
    for line in textwrap.wrap(text, width, subsequent_indent="  ") if width else [text]:
        echo(line)


def echo_table(rows: Sequence[Sequence[str]], flush_right: Sequence[int] = ()) -> None:
    """Print rows in columns that fit the terminal."""
    for line in format_rows(rows, column_widths(rows, terminal_width()), flush_right):
        echo(line)
