"""How objects show themselves: a line or a small table in a terminal, and a table in a notebook.

Names of models come from strangers: unprintable characters and markup are escaped here, and long texts lose their
middle."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from html import escape as escape_markup
from itertools import zip_longest
from math import floor, isfinite, log10
from pathlib import PurePath
from typing import Any

from merging.errors import MergingError, escape_unprintable

__all__ = [
    "Cell",
    "Displayed",
    "Table",
    "Tabular",
    "count_notices",
    "escape",
    "format_numbers",
    "format_size",
    "plural",
]

_ROWS = 20
"""The most rows of a table."""

_WIDEST = 56
"""The most characters of a cell."""

Cell = str | int | float | None
"""A cell of a table: text, a number, or nothing."""


class _ShortRepr(reprlib.Repr):
    """The repr of a value, of a few hundred characters at most."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 4
        self.maxstring = self.maxother = 120

    def repr_float(self, value: float, level: int) -> str:
        return f"{value:.4g}"

    def repr_function(self, value: Any, level: int) -> str:
        return str(value.__qualname__)

    def repr_Tensor(self, value: Any, level: int) -> str:
        dtype = str(value.dtype).removeprefix("torch.")
        return self.repr1(value.tolist(), level) if value.numel() <= 4 else f"Tensor({tuple(value.shape)}, {dtype})"

    repr_Parameter = repr_Tensor

    def repr_instance(self, value: Any, level: int) -> str:
        if isinstance(value, PurePath):
            return self.repr1(str(value), level)
        if isinstance(value, Displayed):
            return value._line(level)
        if isinstance(value, Mapping):
            return self.repr_dict(dict(value), level)
        text = super().repr_instance(value, level)
        return f"<{type(value).__name__}>" if " at 0x" in text else text


_short = _ShortRepr()


class Displayed:
    """Base class of records: ``repr`` is a line with the fields that are set, and notebooks show them as a table."""

    __slots__ = ()

    def _display_fields(self) -> Mapping[str, Any]:
        """Return the fields to show, by name; None and empty ones are left out."""
        return {name: getattr(self, name) for name in _field_names(self)}

    def _set_fields(self) -> dict[str, Any]:
        shown = self._display_fields().items()
        return {name: value for name, value in shown if not _is_empty(value)}

    def _line(self, level: int = 3) -> str:
        values = (f"{name}={_short.repr1(value, level - 1)}" for name, value in self._set_fields().items())
        return f"{type(self).__name__}({', '.join(values) if level > 0 else '...'})"

    def __repr__(self) -> str:
        return self._line()

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        shown = self._set_fields()
        notices = shown.pop("notices", ())
        rows = [(name, _value_text(value)) for name, value in shown.items()]
        return Table(type(self).__name__, rows=rows, notes=count_notices(notices)).html()


class Tabular(Displayed):
    """Base class of results that are shown as a small table everywhere."""

    __slots__ = ()

    def _display_table(self) -> Table:
        """Return the table. What cannot be read is shown as the error that says so."""
        raise NotImplementedError

    def _readable_table(self) -> Table:
        try:
            return self._display_table()
        except MergingError as error:
            return Table(type(self).__name__, notes=(str(error),))

    def __repr__(self) -> str:
        return self._readable_table().text()

    def _repr_html_(self) -> str:
        return self._readable_table().html()


@dataclass(frozen=True, slots=True)
class Table:
    """A title, rows in columns, and notes below them. The first rows are shown, with the number of the others.

    Attributes:
        title: A line with the most important facts.
        header: The names of the columns; none for a table of names and values.
        rows: The rows. Numbers are right-aligned.
        notes: Lines of text below the rows.
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = field(default=(), kw_only=True)
    notes: Sequence[str] = field(default=(), kw_only=True)

    def text(self) -> str:
        """Return the table as lines of text."""
        cells = [[*self.header], *self._format_rows()] if self.header else self._format_rows()
        widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
        right = self._numeric()
        lines = [
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([_shorten(self.title, 2 * _WIDEST), *(f"  {line}" for line in lines), *self._footer()])

    def html(self) -> str:
        """Return the table as HTML, with everything escaped."""
        head = f"<thead>{self._html_row('th', self.header)}</thead>" if self.header else ""
        body = "".join(self._html_row("td", row) for row in self._format_rows())
        title = f'<caption style="text-align: left">{escape(_shorten(self.title, 2 * _WIDEST))}</caption>'
        footer = "".join(f"<p>{escape(line)}</p>" for line in self._footer())
        return f"<div><table>{title}{head}<tbody>{body}</tbody></table>{footer}</div>"

    def _html_row(self, tag: str, cells: Sequence[str]) -> str:
        sides = ("right" if number else "left" for number in self._numeric())
        pairs = zip(cells, sides, strict=True)
        row = "".join(f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in pairs)
        return f"<tr>{row}</tr>"

    def _format_rows(self) -> list[list[str]]:
        columns = [
            [text or _cell_text(cell) for cell, text in zip(column, format_numbers(column), strict=True)]
            for column in zip(*self.rows[:_ROWS], strict=True)
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    def _numeric(self) -> list[bool]:
        columns = zip(*self.rows[:_ROWS], strict=True) if self.rows else [()] * len(self.header)
        return [bool(column) and not any(isinstance(cell, str) for cell in column) for column in columns]

    def _footer(self) -> list[str]:
        left_out = len(self.rows) - _ROWS
        rest = [f"... and {left_out:,} more"] if left_out > 0 else []
        return [*rest, *(_shorten(note, 4 * _WIDEST) for note in self.notes)]


def format_numbers(cells: Sequence[Cell]) -> list[str | None]:
    """Return the floats of a column as text, and None for its other cells.

    All have the decimals that show four digits of the largest. Numbers that would look like zeros have more.
    """
    floats = [abs(cell) for cell in cells if isinstance(cell, float) and isfinite(cell)]
    largest = max(floats, default=0.0)
    decimals = min(6, max(0, 3 - floor(log10(largest)))) if largest else 0

    def float_text(value: float) -> str:
        return f"{value:,.{decimals}f}" if not value or abs(value) >= 0.5 / 10**decimals else f"{value:.2g}"

    return [float_text(cell) if isinstance(cell, float) else None for cell in cells]


def format_size(nbytes: float) -> str:
    """Return bytes as people read them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 model``, ``2 models``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def count_notices(notices: Sequence[str]) -> list[str]:
    """Return a line on the notices of a result, if it has any."""
    return [f"{plural(len(notices), 'notice')}, in .notices: {notices[0]}"] if notices else []


def escape(text: str) -> str:
    """Return a text for a page, with markup and control characters escaped."""
    return escape_markup(escape_unprintable(text, lines=True))


def _field_names(shown: Any) -> list[str]:
    if is_dataclass(shown):
        return [each.name for each in fields(shown) if each.repr]
    return list(type(shown).model_fields)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, bytes, tuple, list, dict, frozenset)) and not value)


def _value_text(value: Any) -> str:
    return str(value) if isinstance(value, (str, PurePath)) else _short.repr(value)


def _cell_text(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, (int, float)) else _shorten(value, _WIDEST)


def _shorten(text: str, longest: int) -> str:
    """Return a text on one line, without its middle if it is long."""
    text = text if len(text) <= longest else f"{text[: longest // 2 - 2]}...{text[-(longest // 2 - 1) :]}"
    return escape_unprintable(text)
