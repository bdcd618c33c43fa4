"""Patterns of tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from merging.errors import OptionError, nearest

__all__ = ["all_matching", "explain_unmatched", "has_wildcards", "matches"]

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
    for pattern in patterns:
        if problem := explain_unmatched(pattern, names):
            raise OptionError(f"{pattern!r} {problem}")
    return {name for name in names if any(matches(pattern, name) for pattern in patterns)}


def explain_unmatched(pattern: str, names: Sequence[str]) -> str:
    """Return the reason why a pattern names none of the tensors, with a better one; "" if it names some."""
    if pattern and any(matches(pattern, name) for name in names):
        return ""
    return f"names no tensor{_hint(pattern, names)}"


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
    near = nearest(pattern, names) or nearest(
        pattern, dict.fromkeys(part for name in names for part in name.split("."))
    )
    return f"{near}: {rule}, such as {names[0]!r}" if names else ""
