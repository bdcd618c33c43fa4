"""Searches: candidates of a merge are tried on examples or by a command, and the best is written with a report."""

from __future__ import annotations

from merging.searches.workflow import Found, search

__all__ = ["Found", "search"]
