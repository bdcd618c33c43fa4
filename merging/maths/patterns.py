"""Patterns of tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from merging.errors import OptionError, nearest

__all__ = ["all_matching", "matches"]


def matches(pattern: str, name: str) -> bool:
    """Whether a tensor's name is meant: the whole of it by wildcards (``*``, ``?``), else a part of it as it stands."""
    return fnmatchcase(name, pattern) if any(sign in pattern for sign in "*?[") else pattern in name


def all_matching(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The names that some pattern means. Raises :class:`~merging.errors.OptionError` for a pattern that means none."""
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        meant = [name for name in names if matches(pattern, name)]
        if not meant or not pattern:
            raise OptionError(f"{pattern!r} names no tensor{nearest(pattern, names)}")
        found.update(meant)
    return found
