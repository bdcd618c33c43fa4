"""A pool of adapters of one base that others left: audited, without repeats, and indexed, so that merges can choose."""

from merging.pool.index import Entry, Finding, Verdict
from merging.pool.pool import Built, Pool

__all__ = ["Built", "Entry", "Finding", "Pool", "Verdict"]
