"""The type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress"]

Progress = Callable[[int, int], None]
"""Called with the bytes or steps done and their total, from one thread at a time."""
