"""Statistics of a model's layers on a few unlabelled examples, for methods that merge by them."""

from merging.statistics.collect import CollectedStatistics, collect_statistics

__all__ = ["CollectedStatistics", "collect_statistics"]
