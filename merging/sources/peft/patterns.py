"""Regular expressions from files, matched as Python's re would, in bounded time.

PEFT matches them by ``re``, where a few characters can keep it busy for years. The engine here is ``regex``, which
transformers needs too: it accepts the syntax of ``re``, look-ahead included, and can be stopped. Names without special
characters, which PEFT itself saves, are looked up."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["PatternError", "Patterns"]

_SECONDS, _SECONDS_EACH, _MOST_SECONDS = 1.0, 20e-6, 30.0
"""Processor time in seconds that all matching of one config shares, the time that each match adds (an ordinary match
takes a tenth of it), and the upper limit."""

_LONGEST, _MOST_REPEATS = 10_000, 1000
"""The most characters of an expression; and of the product of its counts (``{100}``), which compile into copies."""

_SIGNS = frozenset("\\^$*+?{}[]()|")
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_FUZZY = re.compile(r"\{[^\d,}]")
"""Signs that regex reads as the number of allowed errors, and re as plain text."""


class PatternError(ValueError):
    """An expression that is invalid, or takes too long; the message quotes it."""


class Patterns:
    """The expressions of one config. The time for matching all of them together is bounded."""

    def __init__(self) -> None:
        self._spent, self._tries = 0.0, 0
        self._compiled: dict[str, Any] = {}
        self._keys: dict[str, tuple[_Names, dict[int, str]]] = {}

    def match(self, expression: str, text: str, whole: bool = False) -> Any:
        """Match an expression at the start of a text, or with the ``whole`` of it, as ``re.match`` does; None without a
        match.

        Raises :class:`PatternError`.
        """
        with self._time_limit(repr(expression[:80])):
            return self._match(expression, text, whole)

    def first(self, field: str, keys: Iterable[str], path: str) -> str | None:
        """Return the first of a field's keys that matches a module's path or its end, as in PEFT; None without a match.

        Raises :class:`PatternError`.
        """
        if field not in self._keys:
            listed = list(keys)
            plain = {key: place for place, key in enumerate(listed) if not _SIGNS & set(key)}
            others = {place: key for place, key in enumerate(listed) if key not in plain}
            self._keys[field] = _Names(plain), others
        names, others = self._keys[field]
        with self._time_limit("as a whole"):
            place, found = names.first(path)
            for other, key in others.items():
                if place is not None and place < other:
                    break
                if self._match(rf"(.*\.)?({key})$", path, whole=False):
                    return key
            return found

    def _match(self, expression: str, text: str, whole: bool) -> Any:
        self._tries += 1
        if expression not in self._compiled:
            self._compiled[expression] = _compile(expression)
        compiled = self._compiled[expression]
        try:
            return (compiled.fullmatch if whole else compiled.match)(text, timeout=max(self._seconds_left(), 1e-3))
        except TimeoutError:
            raise _too_long(repr(expression[:80])) from None

    def _seconds_left(self) -> float:
        return min(_SECONDS + _SECONDS_EACH * self._tries, _MOST_SECONDS) - self._spent

    @contextmanager
    def _time_limit(self, what: str) -> Iterator[None]:
        """Count the time of a look-up. Raises :class:`PatternError` if none is left."""
        self._tries += 1
        if self._seconds_left() > 0:
            start = time.process_time()
            try:
                yield
            finally:
                self._spent += time.process_time() - start
        if self._seconds_left() <= 0:
            raise _too_long(what)


class _Names:
    """Keys that are names, whose only special character is the dot; found by their length and the places of dots."""

    def __init__(self, places: dict[str, int]) -> None:
        self._lengths: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for name, place in places.items():
            dots = tuple(i for i, each in enumerate(name) if each == ".")
            self._lengths.setdefault(len(name), {}).setdefault(dots, {})[name] = place

    def first(self, path: str) -> tuple[int | None, str | None]:
        """Return the first name that a path ends in, at its start or after a dot, and its position among the keys."""
        found: list[tuple[int, str]] = []
        for length, shapes in self._lengths.items():
            start = len(path) - length
            if start < 0 or (start > 0 and path[start - 1] != "."):
                continue
            for dots, names in shapes.items():
                end = list(path[start:])
                for dot in dots:  # which matches any character
                    end[dot] = "."
                if (name := "".join(end)) in names:
                    found.append((names[name], name))
        return min(found, default=(None, None))


def _compile(expression: str) -> Any:
    import regex

    shown = repr(expression[:80])
    counts = (max(int(least or 0), int(most or 0), 1) for least, most in _COUNT.findall(expression))
    if len(expression) > _LONGEST or math.prod(counts) > _MOST_REPEATS:
        raise _too_long(shown)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(expression)
            if _FUZZY.search(expression):
                raise PatternError(f"{shown} has a brace that is not a count: write it as \\{{")
            return regex.compile(expression)
    except (re.error, regex.error, OverflowError, RecursionError, Warning) as error:
        raise PatternError(f"{shown} is not a regular expression: {error}") from None


def _too_long(shown: str) -> PatternError:
    return PatternError(f"{shown} takes too long to match: write the names out")
