"""One thread's part of a run: gathering statistics of a unit of work, and merging it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from merging.engine.measures import Measures
from merging.engine.outputs import Output, Sink
from merging.engine.probe import Probe
from merging.engine.spool import Spool
from merging.engine.tiles import Tiler
from merging.engine.unit import Span, WorkUnit, accumulate, name_failures, row_blocks
from merging.errors import InputError
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Coefficient
from merging.maths.reductions import Accumulator
from merging.methods.contract.method import ResultStatistic, Statistic
from merging.methods.contract.wrapper import Unwrapped
from merging.plan.items import Item
from merging.plan.merge_plan import Plan
from merging.sources.stored import Stored

__all__ = ["Shared", "Worker"]


@dataclass(slots=True, eq=False)
class Shared:
    """The task of a run and its results so far, common to its workers.

    Attributes:
        devices: the devices that its workers compute on; the CPU if there are none.
        keeps: whether there is room to keep what wrappers made of factors, in ``kept``.
        statistics: the statistics gathered over the whole model, by name.
        kept: stacks of factors as the outer wrappers transformed them, by device and tensor.
        notices: remarks for people.
        discarded: the share of the energy that a lower rank discards, by tensor.
        metrics: numbers that methods report, by name and tensor.
        decomposed: merged changes that were decomposed before, whose leading factors are written.
    """

    plan: Plan
    sink: Sink
    devices: Sequence[torch.device]
    spool: Spool
    keeps: bool
    statistics: dict[str, Tensor] = field(default_factory=dict)
    kept: defaultdict[torch.device, dict[str, Unwrapped]] = field(default_factory=lambda: defaultdict(dict))
    notices: set[str] = field(default_factory=set)
    discarded: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    decomposed: Spool | None = None


class Worker:
    """Works on spans on one device, with buffers of its own.

    Attributes:
        accumulators: of the sweep, one a statistic.
        probe: measures the units that are merged; None where a merge is not measured.
    """

    accumulators: Sequence[Accumulator] = ()
    probe: Probe | None = None

    def __init__(self, shared: Shared, device: torch.device) -> None:
        self.shared = shared
        self.plan = shared.plan
        self.tiler = Tiler(shared.plan, device)
        self.tiler.defers = device.type == "cpu" and not shared.plan.recipe.method.needs_base
        self.output = Output(shared.sink, self.tiler, shared.discarded, shared.notices)
        self._measures = Measures()

    def measure(self) -> None:
        """Measure the units that are merged from now on."""
        self.probe = Probe(self.tiler)
        self.tiler.defers = False  # it looks at all changes

    def gather(self, span: Span, stage: Sequence[Statistic | ResultStatistic]) -> None:
        """Feed the accumulators with a span: with the models' changes, or with what they merge to."""
        with name_failures(span.item.site.name, self.plan.recipe.method):
            _read_ahead(span)
            unit = self._open(span, keep=True)
            if any(isinstance(each, ResultStatistic) for each in stage):
                self._gather_results(unit)
                return
            for each, accumulator in zip(stage, self.accumulators, strict=True):
                unit.accumulate(unit.statistic(each.name), accumulator, unit.statistics(before=each.name))

    def _open(self, span: Span, keep: bool = False) -> WorkUnit:
        kept = self.shared.kept[self.tiler.device]
        unit = WorkUnit(span, self.tiler, self.shared.statistics, kept)
        name = span.item.site.name
        if unit.unwrapped is not None:
            for metric, value in unit.unwrapped.metrics.items():
                self.shared.metrics.setdefault(metric, {})[name] = value
            if keep and unit.stack is not unit.unwrapped.stack and self.shared.keeps:
                kept[name] = unit.unwrapped
        return unit

    def _gather_results(self, unit: WorkUnit) -> None:
        """Feed result statistics; a whole merged tensor, which may be slow to merge, is set aside."""
        item, statistics = unit.span.item, unit.statistics()
        bound = self.plan.recipe.method.at(item.site).result_statistics(len(item.inputs))
        if unit.unwrapped is None:
            for site, stack, base in unit.blocks():
                merged = unit.method.merge(stack, site, statistics)
                if self.plan.weights and base is not None:
                    merged, stack = _as_changes(merged, stack, base)
                for each, accumulator in zip(bound, self.accumulators, strict=True):
                    accumulate(accumulator, each.measure(merged, stack, site), site.name)
            return
        assert unit.stack is not None
        spooled = self._take(self.shared.spool, item)  # by a sweep before, or a run that stopped
        merged, stack = unit.merge_whole() if spooled is None else spooled, unit.stack
        if self.plan.weights and unit.base is not None:
            changes = _as_changes(merged, stack, unit.base)
            merged, stack = changes if spooled is None else (spooled, changes[1])
        if spooled is None:
            self.shared.spool.put(item.site.name, merged)
        for each, accumulator in zip(bound, self.accumulators, strict=True):
            if each.grain == "matrix":
                accumulate(accumulator, each.measure(merged, stack, item.site), item.site.name)
                continue
            for first, last, block in row_blocks(merged, self.tiler.device):
                rows = stack.rows(first, last) if item.site.shape else stack
                accumulate(accumulator, each.measure(block, rows, item.site), item.site.name)

    def take_measures(self) -> Measures | None:
        """Return the measures of all units, and the time that they took; None where the merge is not measured."""
        if self.probe is None:
            return None
        times = {"reading": self.tiler.seconds, "measuring": self.probe.seconds, "writing": self.output.seconds}
        self._measures.add_seconds(times)
        return self._measures

    def merge_unit(self, span: Span) -> list[float]:
        """Merge a span and write it. Return the numbers that were measured, if any."""
        _read_ahead(span)
        if span.item.form == "copy":
            self.output.copy(span)
        else:
            with name_failures(span.item.site.name, self.plan.recipe.method):
                try:
                    self._merge(span)
                except InputError:
                    self.tiler.check_base(span.item)  # the reason, where adapters are added to such a base
                    raise
        numbers = self.probe.take() if self.probe is not None else []
        if numbers:
            self._measures.add(span.item.site.name, numbers)
        return numbers

    def _merge(self, span: Span) -> None:
        item = span.item
        if self.shared.decomposed is not None and item.form == "factors":
            factors = self._take(self.shared.decomposed, item)
            assert isinstance(factors, LowRank)
            self.output.write_leading(item, factors)
            return
        method = self.plan.recipe.method.at(item.site)
        factor = method.factor(item.site, self.shared.statistics, len(item.inputs))
        spooled = self._take(self.shared.spool, item)
        if spooled is not None:
            self._measure_spooled(span, spooled, factor)
            self.output.write_whole(item, spooled, factor, change=True)
            return
        unit = self._open(span)
        if unit.unwrapped is not None:
            merged, change = unit.merge_whole(), not self.plan.weights
            if self.probe is not None and unit.stack is not None:
                self.probe.add_whole(item, unit.stack, merged, unit.base, change=change, factor=factor)
            if unit.base is not None and self.plan.weights and self._needs_change(item):
                merged, change = Dense(merged.dense() - unit.base), True
            self.output.write_whole(item, merged, factor, change)
        elif item.form == "factors":
            full = torch.empty(item.numel, dtype=item.dtype, device=self.tiler.device)
            for start, values, _ in self._merge_blocks(unit, factor):
                values = values * factor if factor != 1 else values
                full[start : start + values.numel()] = values.reshape(-1)
            self.output.write_compressed(item, full.view(item.site.shape))
        else:
            for start, values, base in self._merge_blocks(unit, factor):
                self.output.write_sum(item.outs[0], values, base, factor, start)

    def _take(self, spool: Spool, item: Item) -> Delta | None:
        """Return the change of an item that any worker set aside, on this worker's device."""
        delta = spool.take(item.site.name)
        return None if delta is None else delta.to(self.tiler.device)

    def _measure_spooled(self, span: Span, merged: Delta, factor: Coefficient) -> None:
        """Measure a change that was set aside; the models' changes are read again."""
        if self.probe is None:
            return
        item, base = span.item, None
        if item.cut.way == "factors":
            stack = self.tiler.stack(item)
        else:
            (tile,) = self.tiler.tiles(item, span.start, span.stop)
            stack, base = tile.stack, tile.base
        self.probe.add_whole(item, stack, merged, base, change=True, factor=factor)

    def _needs_change(self, item: Item) -> bool:
        """Return whether merged weights must be turned into a change: to be scaled, or to be written as one."""
        return self.plan.recipe.method.rescales or item.form != "dense"

    def _merge_blocks(self, unit: WorkUnit, factor: Coefficient) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield changes to write times ``factor``, block by block: the start, the change, the base if it is added."""
        item, weights = unit.span.item, self.plan.weights
        as_change = not weights or self._needs_change(item)
        statistics = unit.statistics()
        for site, stack, base in unit.blocks():
            values = unit.method.merge(stack, site, statistics).dense()
            if weights and as_change and base is not None:
                values = values - base
            if self.probe is not None:
                change = not weights or (as_change and base is not None)
                self.probe.add_block(item, site.start, stack, values, base, change=change, factor=factor)
            yield site.start, values, base if item.form == "dense" and as_change else None


def _read_ahead(span: Span) -> None:
    """Have a span read ahead, and the next one, which another worker takes meanwhile."""
    for stored in (*span.item.inputs, span.item.base):
        if isinstance(stored, Stored):
            stored.advise(span.start, 2 * (span.stop - span.start))


def _as_changes(merged: Delta, stack: Stack, base: Tensor) -> tuple[Delta, Stack]:
    """Return merged weights and the models' weights as changes from the base."""
    return Dense(merged.dense() - base), Stack.of(stack.dense() - base, stack.models, stack.present)
