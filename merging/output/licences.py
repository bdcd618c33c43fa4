"""The license of a merge: the strictest license of its sources, where licenses can be ordered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merging.hub.cards import stated_licence
from merging.sources import Adapter, Checkpoint

__all__ = ["Source", "licence_sentence", "source_of", "strictest"]

_LADDER = (
    ("cc0-1.0", "unlicense", "pddl", "wtfpl"),
    ("mit", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "apache-2.0", "cc-by-4.0", "cc-by-3.0"),
    ("bigscience-openrail-m", "openrail", "creativeml-openrail-m", "openrail++", "bigcode-openrail-m"),
    ("cc-by-nc-4.0", "cc-by-nc-3.0", "cc-by-nc-2.0"),
)
"""Licenses that can be combined, in steps of increasing demands. Licenses that demand the same license for derived work
(GPL, ShareAlike, the model families' own) are on no step."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model that a merge was made of: its name, its role, and the license that its card states."""

    name: str
    role: str
    licence: str | None


def source_of(model: Checkpoint | Adapter, role: str = "") -> Source:
    """Return a model as a source for the card. A local model has only its folder's name, as paths are private."""
    if model.origin is not None:
        return Source(str(model.origin), role, model.origin.licence)
    folder = model.path if model.path.is_dir() else model.path.parent
    return Source(model.path.name, role, stated_licence(folder / "README.md"))


def strictest(licences: Sequence[str | None]) -> str | None:
    """Return the license that satisfies all, or None if one is unknown or they cannot be ordered."""
    stated = {licence for licence in licences if licence is not None}
    if None in licences or not stated:
        return None
    if len(stated) == 1:
        return stated.pop()
    steps = {licence: step for step, equals in enumerate(_LADDER) for licence in equals}
    if not stated <= steps.keys():
        return None
    highest = max(steps[licence] for licence in stated)
    last = sorted(licence for licence in stated if steps[licence] == highest)
    return last[0] if len(last) == 1 or highest <= 1 else None


def licence_sentence(licence: str | None) -> str:
    """Return the card's sentence about the license of the merge."""
    if licence:
        return f"Licence: {licence}, the strictest of its sources'; the terms of all of them hold."
    return "Licence: none is stated, since not all sources state one, or theirs have no order: the terms of all hold."
