"""Predictions from headers: the work of a plan, the rates of a machine or a cluster, and the time that follows."""

__all__: list[str] = []
