"""Fonts for names in any script: fonts of this machine where DejaVu Sans lacks a character, else its escape."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from merging.report.style import SETTINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["make_drawable", "shorten_drawable", "use_fonts"]

_DEFAULT = str(SETTINGS["font.family"])

_UNFIT = ("Last Resort", "cm", "STIX")
"""Beginnings of the names of fonts that have boxes for characters, or are for formulas."""

_END = 0x30000
"""The end of the planes that scripts are in."""


def make_drawable(text: str) -> str:
    """Return a text without characters that would be drawn as boxes.

    A question mark stands for each unprintable character, and an escape such as ``\\u6a21`` for each character that no
    font of this machine has.
    """
    return "".join(_units(text))


def shorten_drawable(text: str, most: int) -> str:
    """Return the same with its middle left out where it is longer than ``most`` letters. Escapes stay whole."""
    units = _units(text)
    if sum(map(len, units)) <= most:
        return "".join(units)
    return f"{_fitting(units, most // 2 - 2)}…{_fitting(units[::-1], most // 2 - 1, reverse=True)}"


def _fitting(units: Iterable[str], most: int, reverse: bool = False) -> str:
    """Return the first units that fit into a number of letters, in their order in the text."""
    kept: list[str] = []
    for unit in units:
        if sum(map(len, kept)) + len(unit) > most:
            break
        kept.append(unit)
    return "".join(reversed(kept) if reverse else kept)


def use_fonts(figure: Figure) -> None:
    """Give each text of a figure the fonts that its characters need, after the default font."""
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    for axes in figure.findobj(Axes):
        axes.get_xticklabels()  # makes the labels, which are otherwise empty until they are drawn
        axes.get_yticklabels()
    found: list[Any] = figure.findobj(Text)
    for text in found:
        families = dict.fromkeys(map(_family_of, filter(str.isprintable, text.get_text())))
        if families.keys() - {_DEFAULT, None}:
            text.set_family([_DEFAULT, *(name for name in families if name and name != _DEFAULT)])
            text.set_fontweight("normal")  # a bold font of the family may lack characters


def _units(text: str) -> list[str]:
    """Return what is drawn for each character of a text."""
    return [_unit(character) for character in text]


def _unit(character: str) -> str:
    if character.isascii() and character.isprintable():
        return character
    if not character.isprintable():
        return "?"
    return character if _family_of(character) else ascii(character)[1:-1]


@cache
def _family_of(character: str) -> str | None:
    """Return the family of the first font that has a character, the default font before all others."""
    place, bit = divmod(ord(character), 8)
    for family, file in _fonts():
        bits = _characters(file)
        if place < len(bits) and bits[place] >> bit & 1:
            return family
    return None


@cache
def _characters(file: str) -> bytes:
    """Return a bit for each code point below ``_END``: whether a font has it."""
    from matplotlib.font_manager import get_font

    bits = bytearray(_END // 8)
    try:
        codes = get_font(file).get_charmap()
    except (OSError, RuntimeError):  # a font that matplotlib cannot read, such as one of bitmaps
        codes = {}
    for code in codes:
        if code < _END:
            bits[code // 8] |= 1 << code % 8
    return bytes(bits)


@cache
def _fonts() -> list[tuple[str, str]]:
    """Return families and files of this machine's fonts, upright sans-serif ones of ordinary weight first."""
    from matplotlib.font_manager import fontManager

    def rank(font: Any) -> tuple[bool, bool, bool, int, str, str]:
        name = str(font.name).lower()
        other = any(part in name for part in ("serif", "mono", "ming", "song", "mincho", "batang"))
        weight = font.weight if isinstance(font.weight, int) else 400
        return font.name != _DEFAULT, font.style != "normal", other, abs(weight - 400), name, str(font.fname)

    fonts = [font for font in fontManager.ttflist if not str(font.name).startswith(_UNFIT)]
    return [(str(font.name), str(font.fname)) for font in sorted(fonts, key=rank)]
