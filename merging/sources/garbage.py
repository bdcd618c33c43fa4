"""The garbage collector, while very many objects are made that all live on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["pause_collection"]


@contextmanager
def pause_collection() -> Iterator[None]:
    """Pause the garbage collector, which would look through a million new objects again and again, and find nothing.

    At the end the new objects count as old, so that the next small collection does not look through them either.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # else the program itself keeps objects from the collector
                gc.freeze()
                gc.unfreeze()
            gc.enable()
