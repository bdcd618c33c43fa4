"""Patterns of tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from merging.errors import OptionError, nearest

__all__ = ["all_matching", "has_wildcards", "matches"]

_WILDCARDS = "*?["


def matches(pattern: str, name: str) -> bool:
    """Whether a tensor's name is meant: the whole of it by wildcards (``*``, ``?``), else a part of it as it stands."""
    return fnmatchcase(name, pattern) if has_wildcards(pattern) else pattern in name


def has_wildcards(pattern: str) -> bool:
    """Whether a pattern is compared with whole names, and not with their parts."""
    return any(sign in pattern for sign in _WILDCARDS)


def all_matching(patterns: str | Sequence[str], names: Iterable[str]) -> set[str]:
    """The names that some pattern means. Raises :class:`~merging.errors.OptionError` for a pattern that means none."""
    names, patterns = list(names), [patterns] if isinstance(patterns, str) else patterns
    found: set[str] = set()
    for pattern in patterns:
        meant = [name for name in names if matches(pattern, name)]
        if not meant or not pattern:
            raise OptionError(f"{pattern!r} names no tensor{_hint(pattern, names)}")
        found.update(meant)
    return found


def _hint(pattern: str, names: Sequence[str]) -> str:
    """Return the end of the message about a pattern that means no tensor: patterns that mean some, or the rule."""
    parts = [part.strip() for part in pattern.split(",") if part.strip()]
    if len(parts) > 1:
        return f": a comma does not separate patterns. Give each by itself: {', '.join(map(repr, parts))}"
    wild = has_wildcards(pattern)
    wider = [f"{pattern}*", f"*{pattern}", f"*{pattern}*"] if wild else [pattern.lower()]
    for candidate in wider if pattern else []:
        if count := sum(matches(candidate, name) for name in names):
            rule = "With *, ? or [ a pattern is compared with the whole name" if wild else "Case matters"
            return f". {rule}: {candidate!r} means {count} of the {len(names)} tensors"
    rule = "a pattern is a part of a name, or with *, ? or [ the whole name"
    return f"{nearest(pattern, names)}: {rule}, such as {names[0]!r}" if names else ""
