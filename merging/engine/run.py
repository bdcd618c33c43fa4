"""Running a plan: read, merge and write piece by piece, on all cores or on a GPU.

The plan says how each tensor is cut. Workers take the units of work in the order of the files. Tiles are the same for
any number of workers, and sums over them are exact, so the output's bytes do not depend on the number of workers, nor
on how many devices of one kind share the work.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import cast
from uuid import uuid4

from merging.display.notices import describe_discarded
from merging.display.progress import Progress, announce_phase
from merging.engine.crews import Crew, Decomposing, Gathering, MakeCrew, Merging, ThreadCrew
from merging.engine.decomposition import Decomposition
from merging.engine.devices import main_device
from merging.engine.journal import RunJournal
from merging.engine.journaled_sinks import JournaledSink
from merging.engine.measures import Measures
from merging.engine.outputs import Sink
from merging.engine.process_memory import keep_freed_memory, private_memory, release_freed_memory
from merging.engine.spool import Spool
from merging.engine.sweeps import Sweeps
from merging.engine.tiles import can_be_sampled, tile_size, unit_size
from merging.engine.unit import Span
from merging.engine.worker import Shared
from merging.errors import option
from merging.maths.kernels.switch import switch_kernels
from merging.maths.lazy_torch import Tensor, torch
from merging.methods.contract.method import ResultStatistic, Statistic
from merging.plan.items import TILE
from merging.plan.merge_plan import Plan

__all__ = ["Done", "Sink", "decompose", "run", "work_bytes"]


@dataclass(slots=True)
class Done:
    """The record of a run.

    Attributes:
        seconds: the time it took.
        notices: remarks for people.
        discarded: the share of the change's energy that a lower rank discarded, by tensor.
        metrics: numbers that the method reports, by name; numbers of single tensors as their mean.
    """

    seconds: float
    notices: list[str]
    discarded: dict[str, float]
    metrics: dict[str, float]

    @property
    def energy_notices(self) -> list[str]:
        """The notice about the energy that the rank discards, if it discards any."""
        return describe_discarded(self.discarded, f"raise {option('rank')}, or use {option('kind', 'model')}")


def run(
    plan: Plan,
    sink: Sink,
    *,
    devices: Sequence[torch.device] = (),
    threads: int = 1,
    progress: Progress | None = None,
    scratch: Path | None = None,
    decomposition: Decomposition | None = None,
    journal: RunJournal | None = None,
    pieces: Sequence[Span] | None = None,
    make_crew: MakeCrew | None = None,
    measures: Measures | None = None,
) -> Done:
    """Run a plan, and write the merged tensors to a sink.

    Args:
        plan: the plan.
        sink: the receiver of the merged tensors.
        devices: the devices to compute on, of one kind; the CPU by default.
        threads: the number of workers.
        progress: called with the bytes done and the bytes in all, over all sweeps.
        scratch: a folder for merged changes that are set aside meanwhile; the system's temporary one by default.
        decomposition: the merged changes, where they were decomposed to choose the plan's ranks.
        journal: the finished work of former runs of the plan, which is not done again; the sink is a
            :class:`~merging.engine.journal.JournaledSink` then.
        pieces: the pieces to merge, as :func:`~merging.engine.samples.sample_pieces` chooses them; all by default.
            Statistics are gathered over the whole model all the same.
        make_crew: makes the workers, such as a cluster; by default threads of this process.
        measures: receives the measures of the merged tensors, which cost some time.

    Returns:
        The record of the run.

    Raises:
        MergingError: for values that cannot be merged, files that changed meanwhile, and values that the sink refuses.
            No worker is left running.
    """
    began = time.perf_counter()
    device = main_device(devices)
    keep_freed_memory()
    spool = journal.spool if journal else _make_spool(scratch, make_crew)
    shared = Shared(plan, sink, devices, spool, keeps=plan.kept_bytes > 0)
    stages = _stages(plan)
    if decomposition is not None:
        shared.decomposed, shared.statistics, stages = decomposition.spool, decomposition.statistics, []
        shared.discarded |= decomposition.losses(plan.ranks)
    crew = make_crew(shared) if make_crew else ThreadCrew(shared, threads)
    most = private_memory() + plan.memory(threads)
    spans = _spans(plan, device)
    merged = [span for span in spans if span.item.form != "copy"]
    spans = spans if pieces is None else list(pieces)
    total = sum(span.bytes for span in spans) + _sweeps(stages) * sum(span.bytes for span in merged)
    switch_kernels(total)
    counter = _Counter(progress, total, most)
    try:
        if journal is not None:
            journal.begin(cast(JournaledSink, sink), shared)
        for stage in stages:
            if all(each.name in shared.statistics for each in stage):
                counter.skip(merged, max(each.reduction.sweeps for each in stage))
            else:
                announce_phase(progress, "gathering statistics")
                _gather(shared, stage, merged, crew, counter, journal=journal)
        announce_phase(progress, "merging")
        if journal is None:
            crew.go_through(Merging(measures=measures), spans, counter)
        else:
            _merge_journaled(spans, crew, counter, journal, measures)
    finally:
        if journal is not None:
            journal.end()
        shared.spool.close()
    metrics = {name: fmean(values[tensor] for tensor in sorted(values)) for name, values in shared.metrics.items()}
    metrics |= plan.recipe.method.metrics(shared.statistics, len(plan.models))
    return Done(time.perf_counter() - began, sorted(shared.notices), shared.discarded, metrics)


def _merge_journaled(
    spans: Sequence[Span], crew: Crew, counter: _Counter, journal: RunJournal, measures: Measures | None
) -> None:
    """Merge the spans that no former run finished, and record each."""
    numbers = {span: number for number, span in enumerate(spans)}
    counter.skip([spans[number] for number in journal.done])
    left = [span for span in spans if numbers[span] not in journal.done]
    crew.go_through(Merging(journal, numbers, measures=measures), left, counter)
    if measures is not None:
        for number, measured in journal.measured.items():
            measures.add(spans[number].item.site.name, measured)


def _make_spool(scratch: Path | None, make_crew: MakeCrew | None) -> Spool:
    """Return a spool: with a file that has a name where other processes read it."""
    return Spool(scratch, scratch / f"{uuid4().hex}.spool" if make_crew and scratch else None)


def work_bytes(plan: Plan, device: torch.device) -> int:
    """Return the bytes that a run of a plan reads, over all sweeps."""
    sweeps = _sweeps(_stages(plan))
    return sum(span.bytes * (1 if span.item.form == "copy" else 1 + sweeps) for span in _spans(plan, device))


def _sweeps(stages: Sequence[Sequence[Statistic | ResultStatistic]]) -> int:
    """Return the number of sweeps over the model that gather statistics."""
    return sum(max(each.reduction.sweeps for each in stage) for stage in stages)


def decompose(
    plan: Plan,
    *,
    devices: Sequence[torch.device] = (),
    threads: int = 1,
    progress: Progress | None = None,
    scratch: Path | None = None,
    make_crew: MakeCrew | None = None,
    measures: Measures | None = None,
) -> Decomposition:
    """Merge the changes of a plan that become factors, and decompose them, so that their ranks can be chosen.

    The arguments are the same as for :func:`run`. The result holds a file, which its ``spool`` closes.
    """
    device = main_device(devices)
    keep_freed_memory()
    found = Decomposition(plan, _make_spool(scratch, make_crew))
    shared = Shared(plan, _Nowhere(), devices, _make_spool(scratch, make_crew), keeps=plan.kept_bytes > 0)
    shared.notices = found.notices
    crew = make_crew(shared) if make_crew else ThreadCrew(shared, threads)
    most = private_memory() + plan.memory(threads)
    stages = _stages(plan)
    spans = [span for span in _spans(plan, device) if span.item.form != "copy"]
    counter = _Counter(progress, sum(span.bytes for span in spans) * (1 + _sweeps(stages)), most)
    try:
        for stage in stages:
            announce_phase(progress, "gathering statistics")
            _gather(shared, stage, spans, crew, counter)
        announce_phase(progress, "decomposing")
        crew.go_through(Decomposing(found, measures), spans, counter)
        while more := found.widen():
            again = [span for span in spans if span.item in more]
            crew.go_through(Decomposing(found), again, lambda span: None)
    except BaseException:
        found.spool.close()
        raise
    finally:
        shared.spool.close()
    found.statistics = shared.statistics
    return found


class _Nowhere:
    """A sink of nothing, for merges whose results are only decomposed."""

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Accept no values: a decomposition writes none."""
        raise AssertionError(f"{name} is written while changes are decomposed")


def _stages(plan: Plan) -> list[list[Statistic | ResultStatistic]]:
    """Return the statistics over the whole model, in groups that one sweep can gather.

    :mod:`merging.engine.in_memory` goes through the same stages with tensors in memory: change both.
    """
    method = plan.recipe.method
    stages: list[list[Statistic | ResultStatistic]] = [
        [each] for each in method.required_statistics() if each.per == "model"
    ]
    results = list(method.result_statistics(len(plan.models)))
    return [*stages, [*results]] if results else stages


def _spans(plan: Plan, device: torch.device) -> list[Span]:
    """Return the units of work: items in one piece, or in pieces of a size that depends on the kind of device alone."""
    spans = []
    for item in plan.items:
        tile = item.cut.elements(tile_size(device))
        step = tile * max(1, unit_size(device) // tile) if item.cut.splits else max(1, item.numel)
        spans += [Span(item, start, min(start + step, item.numel)) for start in range(0, max(1, item.numel), step)]
    return spans


class _Counter:
    """Adds up the bytes done over all sweeps for a progress bar, and keeps the process's memory below ``most``."""

    def __init__(self, progress: Progress | None, total: int, most: int) -> None:
        self.progress, self.total, self.most, self.done = progress, total, most, 0
        self._unseen = 0

    def skip(self, spans: Iterable[Span], sweeps: int = 1) -> None:
        """Count spans that a former run finished."""
        self.done += sweeps * sum(span.bytes for span in spans)

    def add_sweep(self, spans: Iterable[Span]) -> None:
        """Expect one more sweep."""
        self.total += sum(span.bytes for span in spans)

    def __call__(self, span: Span) -> None:
        self.done += span.bytes
        self._unseen += span.stop - span.start
        if self._unseen >= TILE:  # asking costs more than a small tensor
            self._unseen = 0
            if private_memory() > self.most:
                release_freed_memory()
        if self.progress:
            self.progress(self.done, self.total)


def _gather(
    shared: Shared,
    stage: Sequence[Statistic | ResultStatistic],
    spans: Sequence[Span],
    crew: Crew,
    counter: _Counter,
    *,
    journal: RunJournal | None = None,
) -> None:
    """Go through all spans as often as the statistics of a stage need, and store their results."""
    dtype = shared.plan.widest
    sweeps = Sweeps([each.name for each in stage], [each.reduction.widen(dtype).start() for each in stage])
    expected = max(each.reduction.sweeps for each in stage)
    if len(stage) == 1 and all(can_be_sampled(span.item) for span in spans):
        sweeps.totals[0].begin_sample()
    if journal is not None:
        journal.follow(sweeps)
    counter.skip(spans, sweeps.number)
    gathering = Gathering(stage, sweeps, {span: number for number, span in enumerate(spans)}, journal)
    unfinished = True
    while unfinished:
        done, left = sweeps.split(spans)
        counter.skip(done)
        crew.go_through(gathering, [span for _, span in left], counter)
        release_freed_memory()  # the next sweep has threads of its own, which do not find all that was freed
        unfinished = sweeps.end_sweep()
        if unfinished and sweeps.number >= expected:
            counter.add_sweep(spans)
    counter.skip(spans, max(0, expected - sweeps.number))
    for each, total in zip(stage, sweeps.totals, strict=True):
        shared.statistics[each.name] = total.result()
