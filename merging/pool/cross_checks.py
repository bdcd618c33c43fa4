"""Checks of an adapter against the whole pool: an unusual norm, too many of one owner, missing files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from merging.errors import option
from merging.pool.duplicates import duplicates
from merging.pool.entry import Entry, Finding
from merging.pool.index import Index
from merging.sources import Checkpoint

__all__ = ["cross_check"]

_OUTLIER = 10.0
"""The largest ratio of a norm to the pool's median, or of the median to a norm."""


def cross_check(pool: Path, index: Index, base: Checkpoint, *, owner_cap: int, allow_unknown_licence: bool) -> None:
    """Check every adapter of a pool against the others, and note the findings.

    An owner's ``owner_cap`` places go to adapters without other findings, the most downloaded first.
    """
    kept = [entry for entry in index.entries() if entry.folder]
    gone = find_missing(pool, kept)
    kept = [entry for entry in kept if entry.name not in gone]
    order = sorted(kept, key=lambda entry: (-entry.downloads, entry.created or "", entry.name))
    index.judge("files", gone)
    index.judge("owners", {})
    index.judge("norms", find_outliers(kept))
    index.judge("duplicates", duplicates(pool, base, order))
    index.judge("licence", {} if allow_unknown_licence else find_unlicensed(kept))
    usable = {entry.name for entry in index.entries(("ok", "repaired"))}
    index.judge("owners", find_over_cap([entry for entry in order if entry.name in usable], owner_cap))


def find_missing(pool: Path, entries: Sequence[Entry]) -> dict[str, Finding]:
    """Return a finding for each adapter whose files are no longer in the pool."""
    why = Finding("files", "quarantined", "its files are no longer in the pool: an audit fetches them again")
    return {entry.name: why for entry in entries if not entry.place(pool).exists()}


def find_outliers(entries: Sequence[Entry]) -> dict[str, Finding]:
    """Return a finding for each adapter whose norm, relative to the changed tensors, is far from the pool's median."""
    sizes = {entry.name: float(entry.figures.get("relative_norm", 0.0)) for entry in entries}
    usual = median([size for size in sizes.values() if size > 0] or [1.0])
    found = {}
    for name, size in sizes.items():
        if len(entries) >= 5 and size > 0 and abs(math.log(size / usual)) > math.log(_OUTLIER):
            reason = f"its norm is {size / usual:.2g} times the pool's median: was it trained with another alpha?"
            found[name] = Finding("norms", "quarantined", reason)
    return found


def find_unlicensed(entries: Sequence[Entry]) -> dict[str, Finding]:
    """Return a finding for each adapter with an owner and no license."""
    remedy = f"{option('allow_unknown_licence', True)} takes it all the same"
    why = Finding("licence", "quarantined", f"states no licence ({remedy})")
    return {entry.name: why for entry in entries if entry.owner and not entry.licence}


def find_over_cap(entries: Sequence[Entry], cap: int) -> dict[str, Finding]:
    """Return a finding for each adapter whose owner has ``cap`` earlier ones."""
    counted: Counter[str] = Counter()
    found = {}
    for entry in entries:
        if entry.owner:
            counted[entry.owner] += 1
            if counted[entry.owner] > cap:
                reason = f"{entry.owner} has {cap} others here already, and more would be a sample of one trainer"
                found[entry.name] = Finding("owners", "quarantined", reason)
    return found
