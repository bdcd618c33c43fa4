"""Pools: public adapters of one base, audited, without duplicates, and indexed, so that merges can choose."""

from merging.pool.entry import Built, Entry, Finding
from merging.pool.entry import PoolVerdict as Verdict
from merging.pool.pool import Pool

__all__ = ["Built", "Entry", "Finding", "Pool", "Verdict"]
