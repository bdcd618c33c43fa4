"""Estimates of the memory and the space on the disk that a merge takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merging.methods.contract.method import Method
from merging.plan.items import TILE, Item
from merging.sources.deferred import Deferred
from merging.sources.stored import Stored
from merging.storage.encodings import Encoding

__all__ = ["FIXED", "KEPT", "encoding_bytes", "kept_bytes", "spool_bytes", "worker_bytes", "working_bytes"]

KEPT = 1 << 29
"""Most bytes of transformed factors that are kept for later sweeps; more are transformed again."""

SCATTERED = 1.8
"""Memory that a worker takes for each byte in use: freed blocks that fit no request are the rest."""

FIXED = 1 << 24
"""Bytes that a merge takes by itself: counters, threads, and what libraries load when they are first used."""


def encoding_bytes(encodings: Iterable[Encoding], workers: int) -> int:
    """Return the memory for values that wait to be encoded: a unit for each worker, and one that is begun."""
    largest = max((each.largest_unit for each in encodings), default=0)
    return (workers + 1) * 4 * largest + workers * 4 * 8 * min(largest, TILE)


def kept_bytes(items: Sequence[Item], method: Method, models: int) -> int:
    """Return the memory for factors as wrappers transform them, if later sweeps need it; 0 if it is more than KEPT."""
    if not method.result_statistics(models) and all(each.per == "tensor" for each in method.required_statistics()):
        return 0
    total = sum(item.factor_bytes for item in items if item.cut.way == "factors")
    return total if total <= KEPT else 0


def spool_bytes(items: Sequence[Item], method: Method, models: int) -> int:
    """Return the space on the disk for merged tensors that wait for the factor that scales them."""
    if not method.result_statistics(models):
        return 0
    total = 0
    for item in items:
        if item.cut.way == "factors" and method.factored:
            total += item.factor_bytes
        elif item.cut.way in ("factors", "whole"):
            total += item.dtype.itemsize * item.numel
    return total


def worker_bytes(items: Sequence[Item], method: Method) -> int:
    """Return the memory of one worker, whose buffers fit the largest item."""
    return int(SCATTERED * max((working_bytes(item, method) for item in items), default=0))


def working_bytes(item: Item, method: Method) -> int:
    """Return about how much memory a worker needs for an item on a CPU: inputs, buffers and results together."""
    width, links = item.dtype.itemsize, method.links()
    tile = min(item.numel, max(item.cut.granule, TILE))
    copies = sum(link.workspace for link in links)
    needed = tile * width * (copies * len(item.inputs) + 6)
    if item.cut.way == "whole":
        needed += 8 * 6 * item.numel  # decompositions in float64
        if any(link.decomposed_side == "longer" for link in links):
            needed += 8 * 4 * max(item.site.shape) ** 2
    in_full = sum(not change.low_rank or change.needs_base is not None for change in item.changes)
    needed += 3 * (item.factor_bytes + width * item.numel * in_full)
    stored = {id(each): each for each in (*item.inputs, item.base) if isinstance(each, Stored)}.values()
    needed += max((each.scratch for each in stored if not isinstance(each, Deferred)), default=0)
    needed += sum(each.scratch for each in stored if isinstance(each, Deferred))  # each keeps buffers of its own
    if item.form == "factors" and not method.factored:
        needed += 4 * width * item.numel
    return needed
