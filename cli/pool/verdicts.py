"""Printing of verdicts: an entry on one line, and counts of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from merging.errors import shorten

from ..output import echo, echo_json

if TYPE_CHECKING:
    from merging.pool import Entry

__all__ = ["LONGEST_REASON", "echo_entry", "echo_verdicts", "format_counts", "format_reason"]

LONGEST_REASON = 600
"""Characters of a reason, which may quote values of a file."""


def echo_entry(entry: Entry) -> None:
    """Print an adapter's verdict and reason on stderr, as they are found."""
    echo(f"{entry.verdict:11} {entry.name}{format_reason(entry)}", err=True)


def echo_verdicts(pool: Path, verdicts: dict[str, int], as_json: bool) -> None:
    """Print how many adapters of a pool have each verdict."""
    if as_json:
        echo_json({"pool": str(pool), "verdicts": verdicts})
    else:
        echo(f"{pool}: {format_counts(verdicts)}")


def format_counts(verdicts: dict[str, int]) -> str:
    """Return verdicts with their counts, as in ``3 ok, 1 rejected``."""
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


def format_reason(entry: Entry) -> str:
    """Return the first reason of an adapter's verdict, after a colon; nothing if there is none."""
    own = [finding for finding in entry.findings if finding.stage == "overruled"]
    reasons = [finding.reason for finding in own or entry.findings if finding.verdict == entry.verdict]
    return f": {shorten(reasons[0], LONGEST_REASON)}" if reasons else ""
