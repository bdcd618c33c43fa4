"""Weights in codes of few bits with scales: read as numbers, as their files hold them, and as they were rounded."""

__all__: list[str] = []
