"""Estimates of the memory and the space on the disk that a merge takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from merging.maths.spectra import is_exact
from merging.methods.contract.method import Method
from merging.plan.items import TILE, Item
from merging.plan.rank_settings import RankSettings
from merging.sources.changes import ExtractedChange
from merging.sources.deferred import Deferred
from merging.sources.reduced_intruders import ReducedIntruders
from merging.sources.stored import FileTensor, Stored
from merging.storage.encodings import Encoding

__all__ = ["FIXED", "KEPT", "encoding_bytes", "kept_bytes", "spool_bytes", "worker_bytes", "working_bytes"]

KEPT = 1 << 29
"""Most bytes of transformed factors that are kept for later sweeps; more are transformed again."""

SCATTERED = 1.8
"""Memory that a worker takes for each byte in use: freed blocks that fit no request are the rest."""

_EXTRA = 8
"""Directions beyond the rank in which an approximate decomposition searches."""

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
            total += item.itemsize * item.numel
    return total


def worker_bytes(items: Sequence[Item], method: Method, rank: int | RankSettings | None, tile: int = TILE) -> int:
    """Return the memory of one worker, whose buffers fit the largest item.

    ``rank`` is the rank of an adapter, and ``tile`` the number of elements in a tile of one model.
    """
    needed = 0
    for item in {_memory_key(item): item for item in items}.values():
        decomposed = item.form == "factors" and not (item.cut.way == "factors" and method.factored)
        apart = decomposition_bytes(item, rank) if decomposed else 0  # in large blocks, which are not scattered
        if any(isinstance(each, ReducedIntruders) for each in item.inputs):
            apart += _lapack_bytes(item.site.shape[0], prod(item.site.shape[1:])) + 8 * 4 * item.numel
        needed = max(needed, int(SCATTERED * working_bytes(item, method, tile)) + apart)
    return needed


def _memory_key(item: Item) -> object:
    """Return a key that items of one shape and type share, since a mixture of experts has many of them."""
    inputs = (*item.inputs, item.base)
    if not all(each is None or type(each) is FileTensor for each in inputs):
        return item
    dtype_names = tuple([each.dtype_name if isinstance(each, Stored) else None for each in inputs])
    return item.site.shape, item.site.kind, item.cut, item.form, dtype_names, item.outs[0].dtype_name


def working_bytes(item: Item, method: Method, tile: int = TILE) -> int:
    """Return about how much memory a worker needs for an item on a CPU: inputs, buffers and results together."""
    width, links = item.itemsize, method.links()
    tile = min(item.numel, max(item.cut.granule, tile))
    held = [change for change in item.changes if not isinstance(change, ExtractedChange)]  # these are read by tiles
    copies = sum(link.workspace for link in links)
    needed = tile * width * (copies * len(item.inputs) + 6)
    if item.cut.way == "whole":
        needed += 8 * 6 * item.numel  # decompositions in float64
        if any(link.decomposed_side == "longer" for link in links):
            needed += 8 * 4 * max(item.site.shape, default=1) ** 2
    in_full = sum(not change.low_rank or change.needs_base is not None for change in held)
    needed += 3 * width * (sum(prod(t.shape) for change in held for t in change.tensors) + item.numel * in_full)
    stored = {id(each): each for each in (*item.inputs, item.base) if isinstance(each, Stored)}.values()
    needed += max((each.scratch for each in stored if not isinstance(each, Deferred)), default=0)
    needed += sum(each.scratch for each in stored if isinstance(each, Deferred))  # each keeps buffers of its own
    return needed


def decomposition_bytes(item: Item, rank: int | RankSettings | None) -> int:
    """Return about how much memory it takes to hold a merged change in full and to make factors of it.

    Where the values decide how many directions are needed, an exact decomposition is assumed.
    """
    shape = item.site.shape
    count = shape[0] if item.site.kind == "experts" else 1
    rows, columns = (shape[1], prod(shape[2:])) if item.site.kind == "experts" else (shape[0], prod(shape[1:]))
    full = min(rows, columns)
    exact = False
    if not isinstance(rank, RankSettings):
        width = rank or full
    else:
        conditions = (rank.energy, rank.error, rank.sv_ratio, rank.size)
        width = rank.most if rank.most and all(each is None for each in conditions) else full
        exact = is_exact(full, width, rank.exact)
    width = min(full, width + _EXTRA)
    factors = 8 * count * width * (rows + columns)
    work = _lapack_bytes(rows, columns) if exact else 0
    return item.itemsize * item.numel + max(work + factors, 4 * factors)


def _lapack_bytes(rows: int, columns: int) -> int:
    """Return the memory of an SVD in float64: two copies, vectors on both sides, and squares of the shorter side."""
    short = min(rows, columns)
    return 8 * (3 * rows * columns + 7 * short * short)
