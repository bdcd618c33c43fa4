"""What only the whole pool tells of an adapter: an unusual norm, too many of one owner, files that are gone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from merging.pool.index import Entry, Finding

__all__ = ["find_missing", "find_outliers", "find_over_cap", "find_unlicensed"]

_OUTLIER = 10.0
"""A norm so many times the median of the pool, or such a fraction of it, is for someone to look at."""


def find_missing(pool: Path, entries: Sequence[Entry]) -> dict[str, Finding]:
    """A finding for each adapter whose files somebody has taken out of the pool."""
    why = Finding("files", "quarantined", "its files are no longer in the pool: merge pool audit fetches them again")
    return {entry.name: why for entry in entries if not entry.place(pool).exists()}


def find_outliers(entries: Sequence[Entry]) -> dict[str, Finding]:
    """A finding for each adapter whose norm, relative to what it changes, is far from what is usual in the pool."""
    sizes = {entry.name: float(entry.figures.get("relative_norm", 0.0)) for entry in entries}
    usual = median([size for size in sizes.values() if size > 0] or [1.0])
    found = {}
    for name, size in sizes.items():
        if len(entries) >= 5 and size > 0 and abs(math.log(size / usual)) > math.log(_OUTLIER):
            reason = f"its norm is {size / usual:.2g} times the pool's median: is its alpha what it was trained with?"
            found[name] = Finding("norms", "quarantined", reason)
    return found


def find_unlicensed(entries: Sequence[Entry]) -> dict[str, Finding]:
    """A finding for each adapter of somebody else's that does not say under which licence."""
    why = Finding("licence", "quarantined", "states no licence (--allow-unknown-license takes it all the same)")
    return {entry.name: why for entry in entries if entry.owner and not entry.licence}


def find_over_cap(entries: Sequence[Entry], cap: int) -> dict[str, Finding]:
    """A finding for each adapter whose owner has ``cap`` others before it."""
    counted: Counter[str] = Counter()
    found = {}
    for entry in entries:
        if entry.owner:
            counted[entry.owner] += 1
            if counted[entry.owner] > cap:
                reason = f"{entry.owner} has {cap} others here already, and more would be a sample of one trainer"
                found[entry.name] = Finding("owners", "quarantined", reason)
    return found
