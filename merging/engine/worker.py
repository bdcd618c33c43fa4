"""One thread's part of a run: merging a unit of work at a time, and gathering what folds want to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from merging.engine.spool import Spool
from merging.engine.tiles import Tiler
from merging.engine.unit import Opened, Unit, blocks, decomposing, feed
from merging.errors import InputError
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.linalg import compress, even, truncate
from merging.maths.parameters import Coefficient
from merging.maths.reductions import Accumulator
from merging.methods.contract.method import ResultStatistic, Statistic
from merging.methods.contract.wrapper import Unwrapped
from merging.plan.items import Item, Plan
from merging.sources.adapter import Change
from merging.sources.stored import DTYPES, Stored
from merging.storage.output_tensor import OutputTensor

__all__ = ["Shared", "Sink", "Worker"]


class Sink(Protocol):
    """Where merged tensors go."""

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take the elements ``values`` (one axis, on the CPU) of a tensor, from position ``start`` on."""


@dataclass(slots=True, eq=False)
class Shared:
    """What the workers of one run have in common: the task, and what they find out.

    ``facts`` are numbers that methods tell, by name and tensor; ``kept`` what wrappers made of factors,
    if there is room for it (``keeps``).
    """

    plan: Plan
    sink: Sink
    device: torch.device
    spool: Spool
    keeps: bool
    statistics: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Unwrapped] = field(default_factory=dict)
    notices: set[str] = field(default_factory=set)
    discarded: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


class Worker:
    """Does units with buffers of its own; ``states`` is what it gathers in a sweep, a state a fold."""

    states: Sequence[Accumulator] = ()

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.plan = shared.plan
        self.tiler = Tiler(shared.plan, shared.device)

    def see(self, unit: Unit, folds: Sequence[Statistic | ResultStatistic]) -> None:
        """Feed folds with a unit: rounds with what the models bring, closings with what they merge to."""
        with decomposing(unit.item.site.name):
            self._see(unit, folds)

    def _see(self, unit: Unit, folds: Sequence[Statistic | ResultStatistic]) -> None:
        self._advise(unit)
        opened = self._open(unit, keep=True)
        result_statistics = [each for each in folds if isinstance(each, ResultStatistic)]
        if result_statistics:
            self._see_merged(opened, result_statistics)
            return
        for each, state in zip(folds, self.states, strict=True):
            opened.see(opened.round(each.name), state, opened.statistics(before=each.name))

    def _open(self, unit: Unit, keep: bool = False) -> Opened:
        opened = Opened(unit, self.tiler, self.shared.statistics, self.shared.kept)
        name = unit.item.site.name
        if opened.unwrapped is not None:
            for fact, value in opened.unwrapped.metrics.items():
                self.shared.metrics.setdefault(fact, {})[name] = value
            if keep and opened.stack is not opened.unwrapped.stack and self.shared.keeps:
                self.shared.kept[name] = opened.unwrapped
        return opened

    def _see_merged(self, opened: Opened, folds: Sequence[ResultStatistic]) -> None:
        """Feed closings; a merge of a whole tensor, which may be dear, is set aside for :meth:`emit`."""
        item, statistics = opened.unit.item, opened.statistics()
        bound = self.plan.recipe.method.at(item.site).result_statistics(len(item.inputs))
        if opened.unwrapped is None:
            for site, stack, base in opened.pieces():
                merged = opened.method.merge(stack, site, statistics)
                if self.plan.weights and base is not None:
                    merged, stack = _as_changes(merged, stack, base)
                for each, state in zip(bound, self.states, strict=True):
                    feed(state, each.measure(merged, stack, site), site.name)
            return
        assert opened.stack is not None
        merged, stack = opened.merged(), opened.stack
        if self.plan.weights and opened.base is not None:
            merged, stack = _as_changes(merged, stack, opened.base)
        self.shared.spool.put(item.site.name, merged)
        for each, state in zip(bound, self.states, strict=True):
            if each.grain == "matrix":
                feed(state, each.measure(merged, stack, item.site), item.site.name)
                continue
            for first, last, block in blocks(merged, self.tiler.device):
                rows = stack.rows(first, last) if item.site.shape else stack
                feed(state, each.measure(block, rows, item.site), item.site.name)

    def _advise(self, unit: Unit) -> None:
        """Have this piece read ahead, and the next one, which another worker takes meanwhile."""
        for stored in (*unit.item.inputs, unit.item.base):
            if isinstance(stored, Stored):
                stored.advise(unit.start, 2 * (unit.stop - unit.start))

    def emit(self, unit: Unit) -> None:
        """Merge a unit and write it."""
        with decomposing(unit.item.site.name):
            self._emit(unit)

    def _emit(self, unit: Unit) -> None:
        self._advise(unit)
        item, method = unit.item, self.plan.recipe.method
        if item.form == "copy":
            self._copy(unit)
            return
        factor = method.at(item.site).factor(item.site, self.shared.statistics, len(item.inputs))
        spooled = self.shared.spool.take(item.site.name)
        if spooled is not None:
            self._emit_whole(item, spooled, factor, change=True)
            return
        opened = self._open(unit)
        if opened.unwrapped is not None:
            merged, change = opened.merged(), not self.plan.weights
            if opened.base is not None and self.plan.weights and (method.rescales or item.form != "dense"):
                merged, change = Dense(merged.dense() - opened.base), True
            self._emit_whole(item, merged, factor, change)
        elif item.form == "factors":
            full = torch.empty(item.numel, dtype=self.plan.dtype(item), device=self.tiler.device)
            for start, values in self._merged(opened, factor):
                full[start : start + values.numel()] = values.reshape(-1)
            self._emit_compressed(item, full.view(item.site.shape))
        else:
            for start, values in self._merged(opened, factor):
                self._write(item.outs[0], values, start)

    def _merged(self, opened: Opened, factor: Coefficient) -> Iterator[tuple[int, Tensor]]:
        """The values to write, tile by tile: the new weights, or their change where the output is an adapter's."""
        item, weights = opened.unit.item, self.plan.weights
        as_change = not weights or self.plan.recipe.method.rescales or item.form != "dense"
        statistics = opened.statistics()
        for site, stack, base in opened.pieces():
            values = opened.method.merge(stack, site, statistics).dense()
            if weights and as_change and base is not None:
                values = values - base
            if item.form == "dense" and as_change and base is not None:
                values = base.add_(values, alpha=float(factor))
            elif factor != 1:
                values = values * factor
            yield site.start, values

    def _emit_whole(self, item: Item, merged: Delta, factor: Coefficient, change: bool) -> None:
        """A merged tensor, or change of one, that is there as a whole."""
        merged = merged.scaled(factor) if factor != 1 else merged
        if item.form == "factors":
            if isinstance(merged, LowRank):
                self._emit_factors(item, merged)
            else:
                self._emit_compressed(item, merged.dense())
            return
        columns = torch.Size(item.site.shape[1:]).numel()
        for first, _, block in blocks(merged, self.tiler.device):
            values = block.dense()
            if change and item.form == "dense" and item.base is not None:
                values = values + self.tiler.raw(item.base, first * columns, values.numel()).view(values.shape)
            self._write(item.outs[0], values, first * columns)

    def _emit_compressed(self, item: Item, full: Tensor) -> None:
        """A merged change that came out in full, as the best factors of the output's rank."""
        shape = item.site.shape
        changes = [each for each in item.inputs if isinstance(each, Change)]
        transposed = any(each.is_transposed(shape) for each in changes)
        matrices = full if any(each.kind == "experts" for each in changes) else full.reshape(shape[0], -1)
        factors, discarded = compress(matrices.mT if transposed else matrices, self.plan.rank, shape, transposed)
        self.shared.discarded[item.site.name] = discarded
        self._emit_factors(item, factors)

    def _emit_factors(self, item: Item, merged: LowRank) -> None:
        """Factors of exactly the output's rank: truncated to it, or padded with zeros up to it."""
        if merged.rank > self.plan.rank:
            merged, discarded = truncate(merged, self.plan.rank)
            self.shared.discarded[item.site.name] = discarded
        if item.outs[0].dtype_name == "F16":
            merged = even(merged, merged.up.dtype)
        missing = self.plan.rank - merged.rank
        down = torch.nn.functional.pad(merged.down, (0, 0, 0, missing))
        up = torch.nn.functional.pad(merged.up, (0, missing))
        if item.written != 1:
            up = up * item.written
        if up.dim() > 2 and not item.placings:
            up = up.permute(1, 2, 0)  # PEFT keeps the rows of down by expert and rank, and the columns of up by rank
        if not item.placings:
            for out, values in zip(item.outs, (down, up), strict=True):
                self._write(out, values)
        for each in item.placings:
            lower, upper = (down, up) if each.expert is None else (down[each.expert], up[each.expert])
            width = each.up.shape[1]
            beside = (each.term, width - each.term - self.plan.rank)
            if each.down:
                self._write(each.down, lower, each.term * lower.shape[1])
            self._write(each.up, torch.nn.functional.pad(upper[each.rows], beside), each.first * width)

    def _write(self, out: OutputTensor, values: Tensor, start: int = 0) -> None:
        flat = self.tiler.outgoing(values, DTYPES[out.dtype_name])
        if not self.plan.recipe.allow_nonfinite and self._doubtful(values, out) and not bool(flat.isfinite().all()):
            wider = "" if out.dtype_name in ("F32", "F64") else ": set a wider --dtype, as float32"
            raise InputError(f"{out.name}: the merged values are beyond the range of {out.dtype_name}{wider}")
        self.shared.sink.write(out.name, flat, start)

    @staticmethod
    def _doubtful(values: Tensor, out: OutputTensor) -> bool:
        """Whether values may have left the range of their type: one sum tells of most that they have not."""
        narrowed = out.dtype_name == "F16" or (values.dtype == torch.float64 and out.dtype_name != "F64")
        return narrowed or (values.is_floating_point() and not isfinite(float(values.sum())))

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


def _as_changes(merged: Delta, stack: Stack, base: Tensor) -> tuple[Delta, Stack]:
    """Merged weights and those of the models as changes from the base."""
    return Dense(merged.dense() - base), Stack.of(stack.dense() - base, stack.models, stack.present)
