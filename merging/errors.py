"""Errors for users: each message says what is wrong, where, and what to do.

Messages name options as their reader types them: ``--overwrite`` on the command line, ``overwrite=True`` in Python."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

__all__ = [
    "FormatError",
    "InputError",
    "MergingError",
    "MergingWarning",
    "OptionError",
    "OutputError",
    "QuantizedError",
    "ResultWarning",
    "command_line_words",
    "either",
    "escape_unprintable",
    "explain_invalid",
    "name_options",
    "nearest",
    "option",
    "shorten",
    "words_of_reader",
]


_LONGEST = 6000
"""The longest message in characters; the list of all methods takes half of that. Longer ones lose their middle."""


class MergingError(Exception):
    """Base of every error that is raised on purpose. The command line prints it as one message and exits with 1.

    Messages quote names and values of files that may be hostile: unprintable characters are escaped, and the middle of
    an endless text is left out.

    Example:
        >>> import merging
        >>> try:
        ...     merging.chain("tise")
        ... except merging.MergingError as error:
        ...     print(type(error).__name__, error)
        OptionError there is no method 'tise' (did you mean 'ties'?)
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


class MergingWarning(UserWarning):
    """Base of every warning of this package, for filters of the module ``warnings``."""


class ResultWarning(MergingWarning):
    """A warning that a result may not be as wanted. It is among the result's notices too."""


class FormatError(MergingError):
    """A file is not what it claims to be, or is of a kind that is refused."""


class QuantizedError(FormatError):
    """Weights are quantised, and are not read as ordinary numbers."""


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


_KINDS = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "is_instance": "a number",  # of a coefficient, which may be a tensor too
    "list": "a list",
    "model": "a mapping",
    "string": "text",
    "tuple": "a list",
}
"""Kinds of values by the beginnings of the types of pydantic's errors."""

_FAULTS = {
    "extra_forbidden": "is not known here",
    "finite_number": "should be a finite number",
    "missing": "is missing",
    "string_pattern_mismatch": "is not of the right form",
    "union_tag_not_found": "does not say what it is",
}
"""Words for whole types of pydantic's errors."""

_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


def explain_invalid(error: Mapping[str, Any]) -> str:
    """Return the words for one of pydantic's errors about a value, such as ``"should be at least 1"``."""
    kind = str(error["type"])
    context = error.get("ctx", {})
    bounds = [(words, context[key]) for key, words in _BOUNDS.items() if key in context]
    if bounds:
        said = (f"{words} {f'{bound:g}' if isinstance(bound, float) else bound}" for words, bound in bounds)
        return f"should be {' and '.join(said)}"
    for key in ("expected", "expected_tags"):
        if key in context:
            return f"should be {context[key]}"
    if kind == "too_short":
        least = context["min_length"]
        return f"should have at least {least} {'value' if least == 1 else 'values'}"
    if kind == "value_error":  # raised by a check of ours
        return str(error["msg"]).removeprefix("Value error, ")
    right = next((words for start, words in _KINDS.items() if kind.startswith(f"{start}_")), None)
    return _FAULTS.get(kind) or (f"should be {right}" if right else f"is not valid ({kind})")


_FLAGS = {
    "allow_unknown_licence": "--allow-unknown-license",
    "components": "--component",
    "kind": "--as",
    "output": "-o",
}
"""The options that are spelled in another way than their parameters in Python."""

_KEYS = {"kind": "as"}
"""The keys of recipes that are spelled in another way than their parameters in Python."""

_on_command_line = False
"""Whether a command runs. One switch for the whole process, since its worker threads raise errors too."""

_flags: Collection[str] | None = None
"""The parameters that are options of the running command, where all others are keys of its recipe."""


@contextmanager
def command_line_words(flags: Collection[str] | None = None) -> Iterator[None]:
    """Name options as on the command line in all messages while a command runs, instead of as in Python.

    Args:
        flags: The parameters that are options of a command with a recipe: messages name all others as keys of the
            recipe. By default all are options.
    """
    with _use_words(True, flags):
        yield


def words_of_reader() -> Callable[[], AbstractContextManager[None]]:
    """Return a maker of contexts in which messages have the words for the present reader, also in other processes."""
    return partial(_use_words, _on_command_line, _flags)


@contextmanager
def _use_words(on_command_line: bool, flags: Collection[str] | None) -> Iterator[None]:
    global _on_command_line, _flags
    before = _on_command_line, _flags
    _on_command_line, _flags = on_command_line, flags
    try:
        yield
    finally:
        _on_command_line, _flags = before


def either(command_line: str, python: str) -> str:
    """Return the words for the present reader, where they differ in more than the name of an option."""
    return command_line if _on_command_line else python


def option(name: str, *values: str | float) -> str:
    """Return an option for a message.

    Args:
        name: The parameter's name in Python.
        values: The value to give, or several to choose from; True or False for a switch. A text in capitals stands
            for a value.
    """
    if _on_command_line and _flags is not None and name not in _flags:
        said = " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
        return f"{_KEYS.get(name, name)}{': ' if said else ''}{said} in the recipe"
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if len(values) == 1 and values[0] is False:
        flag = flag.replace("--", "--no-")
    shown = " or ".join(str(value) for value in values if not isinstance(value, bool))
    quoted = " or ".join(f'"{value}"' if _is_name(value) else str(value) for value in values)
    return either(f"{flag} {shown}".rstrip(), f"{name}={quoted}")


def _is_name(value: object) -> bool:
    """Return whether a value is a text, and not a word in capitals that stands for one."""
    return isinstance(value, str) and not value.isupper()


_IN_BRACES = re.compile(r"\{(\w+(?:=\w+)?(?:, \w+(?:=\w+)?)*)\}")


def name_options(text: str) -> str:
    """Return a text whose options are named for the present reader.

    Args:
        text: A text with options in braces: ``{kind=model, base=BASE}`` becomes ``--as model --base BASE`` on the
            command line, and ``kind="model", base=BASE`` in Python. ``{load=True}`` is a switch.
    """

    def name(match: re.Match[str]) -> str:
        named = []
        for pair in match[1].split(", "):
            key, _, value = pair.partition("=")
            values = [True if value == "True" else value] if value else []
            named.append(option(key, *values))
        return either(" ", ", ").join(named)

    return _IN_BRACES.sub(name, text)
