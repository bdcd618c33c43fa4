"""Names of tensors that differ in their prefix alone: a model with a head, and the same model without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["find_by_end", "index_ends"]

_FEWEST = 3
"""Parts of a name that identify a tensor."""


def index_ends(names: Iterable[str]) -> dict[str, str]:
    """Return the name with each end of several parts, without ends that two names have."""
    found: dict[str, str | None] = {}
    for name in names:
        for end in _ends(name):
            found[end] = None if end in found else name
    return {end: name for end, name in found.items() if name is not None}


def find_by_end(name: str, names: Iterable[str], index: Mapping[str, str]) -> str | None:
    """Return the same name among ``names``, or the only one with the same end; ``index`` is from their ends."""
    if name in names:
        return name
    return next((index[end] for end in _ends(name) if end in index), None)


def _ends(name: str) -> list[str]:
    """Return the ends of a name that identify a tensor, the longest first."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(max(1, len(parts) - _FEWEST + 1))]
