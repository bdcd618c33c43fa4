"""The garbage collector, while very many objects are made that all live on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["pause_collection"]

_VERY_MANY = 200_000
"""New objects that a small collection would take some hundredths of a second to look through."""


@contextmanager
def pause_collection() -> Iterator[None]:
    """Pause the garbage collector, which would look through a million new objects again and again, and find nothing.

    Where there were very many, they count as old at the end, so that the next small collection does not look through
    them either. Otherwise everything stays as young as it is: what counts as old too early is not freed for long.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            # frozen objects are those that the program itself keeps from the collector
            if gc.get_count()[0] > _VERY_MANY and not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()
