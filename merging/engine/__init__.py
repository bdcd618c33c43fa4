"""Carrying a plan out: workers, tiles, threads, and what is looked at and fetched before."""

__all__: list[str] = []
