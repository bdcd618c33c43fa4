"""Checks of an adapter against the whole pool, by stored limits: an unusual norm, too many of one owner, lost files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from merging.errors import FormatError, OptionError, option
from merging.pool.duplicates import duplicates
from merging.pool.entry import Entry, Finding
from merging.pool.index import Index
from merging.sources import Checkpoint

__all__ = ["OWNER_CAP", "cross_check", "store_limits"]

OWNER_CAP = 10
"""The most adapters of one owner that merges may choose. A few training services own most public adapters."""

_OUTLIER = 10.0
"""The largest ratio of a norm to the pool's median, or of the median to a norm."""


def store_limits(index: Index, owner_cap: int | None, allow_unknown_licence: bool | None) -> None:
    """Store the limits that are given in the index, for this check and later ones."""
    if owner_cap is not None:
        if owner_cap < 1:
            raise OptionError(f"owner_cap = {owner_cap}: at least one adapter of each owner is needed")
        index.note(owner_cap=str(owner_cap))
    if allow_unknown_licence is not None:
        index.note(allow_unknown_licence=str(allow_unknown_licence))


def cross_check(pool: Path, index: Index, base: Checkpoint, on_event: Callable[[Entry], None] | None = None) -> None:
    """Check every adapter of a pool against the others, by the stored limits, and note the findings.

    An owner's places go to adapters without other findings, the most downloaded first. ``on_event`` receives each
    adapter whose verdict changes.
    """
    before = {entry.name: entry.verdict for entry in index.entries()}
    stated = index.fact("owner_cap") or str(OWNER_CAP)
    if not re.fullmatch("[1-9][0-9]{0,9}", stated):
        raise FormatError(f"{pool}: its owner_cap is {stated[:20]!r}, and should be a number: set it again")
    unlicensed = index.fact("allow_unknown_licence") == "True"
    _judge(pool, index, base, owner_cap=int(stated), allow_unknown_licence=unlicensed)
    for entry in index.entries():
        if on_event and entry.verdict != before[entry.name]:
            on_event(entry)


def _judge(pool: Path, index: Index, base: Checkpoint, *, owner_cap: int, allow_unknown_licence: bool) -> None:
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
