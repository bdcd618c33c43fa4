"""The statistics of a pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from merging.pool.pool import Pool

__all__ = ["stats"]

_MOST = 10


def stats(pool: Pool) -> dict[str, Any]:
    """Return the statistics of a pool, for people and for JSON.

    They are the verdicts of all adapters, the stages that held adapters back, and the owners, ranks, licenses, kinds
    and bytes of the usable adapters. Each has at most its ten most frequent values.
    """
    entries = pool.index.entries()
    usable = [entry for entry in entries if entry.usable]
    held = [(e, f) for e in entries for f in e.findings if not e.usable and f.verdict == e.verdict]
    return {
        "base": pool.base,
        "adapters": len(entries),
        "verdicts": pool.verdicts(),
        "held back at": _frequent(finding.stage for _, finding in held),
        "usable": len(usable),
        "owners": _frequent(entry.owner or "local" for entry in usable),
        "ranks": _frequent(str(entry.rank) for entry in usable),
        "licences": _frequent(entry.licence or "not stated" for entry in usable),
        "kinds": _frequent(entry.kind or "" for entry in usable),
        "bytes": sum(entry.size for entry in usable),
    }


def _frequent(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common(_MOST))
