"""Pairs of cases for tests that would take too long with every pair."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["third_of_pairs"]


def third_of_pairs(ones: Collection[str], others: Collection[str]) -> list[tuple[str, str]]:
    """Return a third of all pairs, in which each case has a third of the others."""
    return [
        (one, other) for row, one in enumerate(ones) for column, other in enumerate(others) if (row + column) % 3 == 0
    ]
