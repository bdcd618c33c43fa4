"""Statistics of a model's layers on a few unlabelled examples, for methods that merge by them."""

from merging.statistics.collect import CollectedStatistics, collect_statistics
from merging.statistics.through_merge import collect_merged_statistics

__all__ = ["CollectedStatistics", "collect_merged_statistics", "collect_statistics"]
