"""Under which licence a merge may be passed on: the strictest of its sources', where they can be put in an order."""

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
"""Licences that can be mixed, each step asking for more than the ones before it. Those that demand that what is made
of their work has the very same licence (GPL, ShareAlike, the model families' own) stand on none."""


@dataclass(frozen=True, slots=True)
class Source:
    """One of the models a merge was made of: what it is called, its part, and the licence that its card states."""

    name: str
    role: str
    licence: str | None


def source_of(model: Checkpoint | Adapter, role: str = "") -> Source:
    """What the card says of a model. Of local ones the folder's name, as paths are nobody else's business."""
    if model.origin is not None:
        return Source(str(model.origin), role, model.origin.licence)
    folder = model.path if model.path.is_dir() else model.path.parent
    return Source(model.path.name, role, stated_licence(folder / "README.md"))


def strictest(licences: Sequence[str | None]) -> str | None:
    """The licence that fulfils all of them, or None where one is unknown or they cannot be put in an order."""
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
    """What the card says about the licence of the merge."""
    if licence:
        return f"Licence: {licence}, the strictest of its sources'; the terms of all of them hold."
    return "Licence: none is stated, since not all sources state one, or theirs have no order: the terms of all hold."
