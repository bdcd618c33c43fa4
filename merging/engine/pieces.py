"""Merged tensors computed piece by piece when they are read: the bytes that a whole run would write."""

from __future__ import annotations

import threading
from collections import defaultdict
from math import prod
from typing import Any

from merging.engine.spool import Spool
from merging.engine.tiles import tile_size
from merging.engine.unit import Span, WorkUnit, name_failures, row_step
from merging.engine.worker import Shared, Worker
from merging.maths.delta import Delta
from merging.maths.lazy_torch import Tensor, torch
from merging.methods.contract.method import Statistics
from merging.plan.items import Item
from merging.plan.merge_plan import Plan
from merging.sources.dtypes import DTYPES
from merging.sources.stored import Stored

__all__ = ["PieceReader"]


class PieceReader:
    """Computes pieces of a plan's output when they are read. Each thread has a worker of its own.

    ``notices`` receives remarks for people.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.notices: set[str] = set()
        self._items = {item.outs[0].name: item for item in plan.items}
        self._workers = threading.local()
        self._statistics: dict[str, Statistics] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PieceReader, (self.plan, self.device)

    def read(self, name: str, buffer: Tensor, start: int) -> None:
        """Fill a buffer with the elements of a tensor from ``start`` on."""
        worker = getattr(self._workers, "worker", None)
        if worker is None:
            worker = self._workers.worker = _PieceWorker(self)
        item, done = self._items[name], 0
        while done < len(buffer):
            first, values = worker.piece(item, start + done)
            behind = start + done - first
            count = min(len(buffer) - done, len(values) - behind)
            buffer[done : done + count] = values[behind : behind + count]
            done += count

    def advise(self, name: str, start: int, count: int) -> None:
        """Have the inputs of these elements read ahead."""
        item = self._items[name]
        for stored in (*item.inputs, item.base):
            if isinstance(stored, Stored):
                stored.advise(start, count)

    def statistics(self, item: Item, worker: Worker) -> Statistics:
        """Return the statistics of a tensor, which the first thread to ask gathers."""
        if item.form == "copy" or item.cut.way == "whole" or not self.plan.recipe.method.required_statistics():
            return {}
        with self._lock:
            lock = self._locks[item.site.name]
        with lock:
            if item.site.name not in self._statistics:
                unit = WorkUnit(Span(item, 0, item.numel), worker.tiler, {}, {})
                self._statistics[item.site.name] = unit.statistics()
        return self._statistics[item.site.name]


class _PieceWorker(Worker):
    """One thread's worker, which keeps the last piece: inputs of one merge that are the same stage share it."""

    def __init__(self, reader: PieceReader) -> None:
        self.sink = _Piece()
        shared = Shared(reader.plan, self.sink, [reader.device], Spool(None), keeps=False, notices=reader.notices)
        super().__init__(shared, reader.device)
        self.reader = reader
        self._last: tuple[str, int] | None = None
        self._merged: tuple[str, Delta] | None = None

    def piece(self, item: Item, position: int) -> tuple[int, Tensor]:
        """Return the piece of a tensor that holds an element: its first position, and its values.

        A run has the same pieces, as their bytes depend on where they begin and end.
        """
        name = item.site.name
        with torch.inference_mode(), name_failures(name, self.plan.recipe.method):
            size = self._size(item)
            first = position // size * size
            if self._last != (name, first):
                self._last = None  # until it is whole
                self.sink.begin(first, min(size, item.numel - first), DTYPES[item.outs[0].dtype_name])
                self._compute(item, first)
                self._last = (name, first)
        return first, self.sink.values

    def _size(self, item: Item) -> int:
        if item.cut.way == "factors":
            return row_step(self._change(item), self.tiler.device) * prod(item.site.shape[1:])
        return item.cut.elements(tile_size(self.tiler.device))

    def _compute(self, item: Item, first: int) -> None:
        if item.cut.way == "factors":
            columns = prod(item.site.shape[1:])
            rows = len(self.sink.values) // columns
            block = self._change(item).rows(first // columns, first // columns + rows)
            self.output.write_block(item, block, first, change=True)
        else:
            self.merge_unit(Span(item, first, first + len(self.sink.values)))

    def _change(self, item: Item) -> Delta:
        """Return the merged change of a whole tensor as factors, times its factor."""
        name = item.site.name
        if self._merged is None or self._merged[0] != name:
            unit = WorkUnit(Span(item, 0, item.numel), self.tiler, {}, {})
            factor = self.plan.recipe.method.at(item.site).factor(item.site, {}, len(item.inputs))
            merged = unit.merge_whole()
            self._merged = name, merged.scaled(factor) if factor != 1 else merged
        return self._merged[1]

    def _open(self, span: Span, keep: bool = False) -> WorkUnit:
        return WorkUnit(span, self.tiler, self.reader.statistics(span.item, self), {})


class _Piece:
    """The receiver of the piece that is computed now."""

    values: Tensor
    first = 0

    def begin(self, first: int, size: int, dtype: torch.dtype) -> None:
        """Make room for a piece."""
        self.first, self.values = first, torch.empty(size, dtype=dtype)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take elements of the piece."""
        self.values[start - self.first : start - self.first + len(values)] = values
