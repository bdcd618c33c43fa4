"""Errors for users: each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "FormatError",
    "InputError",
    "MergingError",
    "OptionError",
    "OutputError",
    "escape_unprintable",
    "nearest",
    "shorten",
]


_LONGEST = 6000
"""The longest message in characters; the list of all methods takes half of that. Longer ones lose their middle."""


class MergingError(Exception):
    """Base of every error that is raised on purpose. The command line prints it as one message and exits with 1.

    Messages quote names and values of files that may be hostile: unprintable characters are escaped, and the middle of
    an endless text is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape_unprintable(shorten(message, _LONGEST)))


def escape_unprintable(text: str, lines: bool = False) -> str:
    """Escape every character that is not printable, so that any terminal and any file can take the text.

    Args:
        text: A text, perhaps of a stranger.
        lines: Whether ends of lines are kept. By default they are escaped, so that no name looks like a line of its
            own.

    Returns:
        The text, printable everywhere.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or (lines and each == "\n") else ascii(each)[1:-1] for each in text)


def shorten(text: str, longest: int = 200) -> str:
    """Return a text without its middle if it is longer than ``longest`` characters, with its length stated."""
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]} ... {text[-longest // 3 :]} ({len(text):,} characters)"


class FormatError(MergingError):
    """A file is not what it claims to be, or is of a kind that is refused."""


class InputError(MergingError):
    """Inputs are missing, do not fit together, or hold values that cannot be merged."""


class OptionError(MergingError):
    """A method, parameter or setting is unknown, out of range or out of place."""


class OutputError(MergingError):
    """The output cannot be written where it was asked for."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the most similar known word, or "", for the end of a message."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""
