"""One thread's part of a run: merging a unit of work at a time, and gathering what folds want to see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from merging.delta import Delta, Dense, LowRank, Stack
from merging.errors import InputError
from merging.folds import State
from merging.linalg import compress, truncate
from merging.method import Closing, Coefficient, Method, Round, Seen, Site
from merging.plan.items import Item, Plan
from merging.sources.adapter import LoraChange
from merging.sources.stored import DTYPES, Out, Stored
from merging.tiles import Tiler, row_step

__all__ = ["Shared", "Sink", "Unit", "Worker"]


class Sink(Protocol):
    """Where merged tensors go."""

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take the elements ``values`` (one axis, on the CPU) of a tensor, from position ``start`` on."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A piece of an item, by flat offsets; the whole item unless it lies in full."""

    item: Item
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.item.read_bytes * (self.stop - self.start) // max(1, self.item.numel)


@dataclass(slots=True, eq=False)
class Shared:
    """What the workers of one run have in common: the task, and what they find out."""

    plan: Plan
    sink: Sink
    device: torch.device
    seen: dict[str, Tensor] = field(default_factory=dict)
    notices: set[str] = field(default_factory=set)
    discarded: dict[str, float] = field(default_factory=dict)


class Worker:
    """Does units with buffers of its own; ``state`` is what it gathers in a sweep."""

    state: State

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.plan = shared.plan
        self.tiler = Tiler(shared.plan, shared.device)

    def see(self, unit: Unit, fold: Round | Closing) -> None:
        """Feed a fold with a unit: a round with what the models bring, a closing with what they merge to."""
        self._advise(unit)
        if isinstance(fold, Closing):
            self._see_merged(unit, fold)
            return
        for site, stack, _ in self._pieces(unit):
            self._add(self.state, fold.of(stack, site, self.shared.seen), site)

    def _see_merged(self, unit: Unit, fold: Closing) -> None:
        item, method = unit.item, self._method(unit.item)
        seen = self._seen(unit, method)
        if self.plan.factored(item):
            stack = self.tiler.stack(item)
            merged = method.merge(stack, item.site, seen)
            step = row_step(item.numel // item.site.shape[0], self.tiler.device)
            for first in range(0, item.site.shape[0], step):
                last = min(first + step, item.site.shape[0])
                self._add(self.state, fold.of(merged.rows(first, last), stack.rows(first, last), item.site), item.site)
            return
        for site, stack, base in self._pieces(unit):
            merged = method.merge(stack, site, seen)
            if self.plan.weights and base is not None:
                merged = Dense(merged.dense() - base)
                stack = Stack.of(stack.dense() - base, stack.models, stack.present)
            self._add(self.state, fold.of(merged, stack, site), site)

    def _advise(self, unit: Unit) -> None:
        """Have this piece read ahead, and the next one, which another worker takes meanwhile."""
        for stored in (*unit.item.inputs, unit.item.base):
            if isinstance(stored, Stored):
                stored.advise(unit.start, 2 * (unit.stop - unit.start))

    @staticmethod
    def _add(state: State, values: Tensor, site: Site) -> None:
        try:
            state.add(values, site.name)
        except ValueError as error:
            raise InputError(str(error)) from None

    def _pieces(self, unit: Unit) -> Iterator[tuple[Site, Stack, Tensor | None]]:
        """The tiles of a unit with their sites; all of it at once where factors are merged."""
        item = unit.item
        if self.plan.factored(item):
            yield item.site, self.tiler.stack(item), None
            return
        for tile in self.tiler.tiles(item, unit.start, unit.stop):
            yield item.site.block(tuple(tile.stack.dense().shape[1:]), tile.start), tile.stack, tile.base

    def _method(self, item: Item) -> Method:
        return self.plan.recipe.method.at(item.site)

    def _seen(self, unit: Unit, method: Method) -> Seen:
        """The results of all rounds, those over this tensor alone gathered now."""
        seen = dict(self.shared.seen)
        for each in method.rounds():
            if each.per != "tensor":
                continue
            state = each.fold.start()
            while True:
                for site, stack, _ in self._pieces(unit):
                    self._add(state, each.of(stack, site, seen), site)
                if not state.next():
                    break
            seen[each.name] = state.result()
        return seen

    def emit(self, unit: Unit) -> None:
        """Merge a unit and write it."""
        self._advise(unit)
        item = unit.item
        if item.form == "copy":
            self._copy(unit)
            return
        method = self._method(item)
        seen = self._seen(unit, method)
        factor = self.plan.recipe.method.factor(item.site, seen, len(item.inputs))
        if self.plan.factored(item):
            merged = method.merge(self.tiler.stack(item), item.site, seen)
            merged = merged.scaled(factor) if factor != 1 else merged
            self._emit_factors(item, merged) if item.form == "factors" else self._emit_rows(item, merged)
        elif item.form == "factors":
            self._emit_compressed(unit, method, seen, factor)
        else:
            for start, values in self._merged(unit, method, seen, factor):
                self._write(item.outs[0], values, start)

    def _merged(self, unit: Unit, method: Method, seen: Seen, factor: Coefficient) -> Iterator[tuple[int, Tensor]]:
        """The values to write, tile by tile: the new weights, or their change where the output is an adapter's."""
        item, weights = unit.item, self.plan.weights
        as_change = not weights or self.plan.recipe.method.rescales or item.form != "dense"
        for site, stack, base in self._pieces(unit):
            values = method.merge(stack, site, seen).dense()
            if weights and as_change and base is not None:
                values = values - base
            if item.form == "dense" and as_change and base is not None:
                values = base.add_(values, alpha=float(factor))
            elif factor != 1:
                values = values * factor
            yield site.start, values

    def _write(self, out: Out, values: Tensor, start: int = 0) -> None:
        flat = self.tiler.outgoing(values, DTYPES[out.kind])
        if not self.plan.recipe.allow_nonfinite and self._doubtful(values, out) and not bool(flat.isfinite().all()):
            raise InputError(
                f"{out.name}: the merged values are beyond the range of {out.kind}: set a wider --dtype, as float32"
            )
        self.shared.sink.write(out.name, flat, start)

    @staticmethod
    def _doubtful(values: Tensor, out: Out) -> bool:
        """Whether values may have left the range of their type: one sum tells of most that they have not."""
        narrowed = out.kind == "F16" or (values.dtype == torch.float64 and out.kind != "F64")
        return narrowed or (values.is_floating_point() and not isfinite(float(values.sum())))

    def _emit_rows(self, item: Item, merged: Delta) -> None:
        """A merged change by rows, on top of the base where the output is the whole tensor."""
        shape = item.site.shape
        columns = item.numel // shape[0]
        step = row_step(columns, self.tiler.device)
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            values = merged.rows(first, last).dense()
            if item.form == "dense" and item.base is not None:
                values += self.tiler.raw(item.base, first * columns, values.numel()).view(values.shape)
            self._write(item.outs[0], values, first * columns)

    def _emit_compressed(self, unit: Unit, method: Method, seen: Seen, factor: Coefficient) -> None:
        """A merged change that came out in full, as the best factors of the output's rank."""
        item = unit.item
        full = torch.empty(item.numel, dtype=self.plan.dtype(item), device=self.tiler.device)
        for start, values in self._merged(unit, method, seen, factor):
            full[start : start + values.numel()] = values.reshape(-1)
        shape = item.site.shape
        transposed = next(e.is_transposed(shape) for e in item.inputs if isinstance(e, LoraChange))
        matrix = full.view(shape).mT if transposed else full.view(shape[0], -1)
        factors, discarded = compress(matrix, self.plan.rank, shape, transposed)
        self.shared.discarded[item.site.name] = discarded
        self._emit_factors(item, factors)

    def _emit_factors(self, item: Item, merged: Delta) -> None:
        """Factors of exactly the output's rank: truncated to it, or padded with zeros up to it."""
        assert isinstance(merged, LowRank)
        if merged.rank > self.plan.rank:
            merged, discarded = truncate(merged, self.plan.rank)
            self.shared.discarded[item.site.name] = discarded
        missing = self.plan.rank - merged.rank
        down = torch.nn.functional.pad(merged.down, (0, 0, 0, missing))
        up = torch.nn.functional.pad(merged.up, (0, missing))
        for out, values in zip(item.outs, (down, up), strict=True):
            self._write(out, values)

    def _copy(self, unit: Unit) -> None:
        """The base's values as they are; the other models' integers are looked at only to tell if they differ."""
        item, (out,) = unit.item, unit.item.outs
        assert item.base is not None
        values = self.tiler.raw(item.base, unit.start, unit.stop - unit.start)
        self._write(out, values, unit.start)
        if not item.base.floating:
            values = values.clone()
            for slot, stored in enumerate(item.inputs):
                if isinstance(stored, Stored) and stored.dtype == values.dtype:
                    other = self.tiler.raw(stored, unit.start, unit.stop - unit.start)
                    if not torch.equal(values, other):
                        path = self.plan.models[slot].path
                        self.shared.notices.add(
                            f"{item.site.name} of {path} differs, and integers are not merged: kept the base's"
                        )
