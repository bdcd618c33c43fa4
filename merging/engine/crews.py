"""The crew of a run: its workers, wherever they are, and the kinds of work that they do on all units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, Protocol

from merging.engine.decomposition import Decomposer, Decomposition, is_unchanged
from merging.engine.journal import RunJournal
from merging.engine.journaled_sinks import CountingSink
from merging.engine.measures import Measures
from merging.engine.spool import Spool
from merging.engine.sweeps import SweepPart, Sweeps, copy_to_host
from merging.engine.threads import share_out
from merging.engine.unit import Span
from merging.engine.worker import Shared, Worker
from merging.maths.lazy_torch import torch
from merging.maths.reductions import Accumulator
from merging.maths.spectra import SingularValues
from merging.methods.contract.method import ResultStatistic, Statistic

__all__ = ["Crew", "Decomposing", "DecomposingElsewhere", "Gathering", "MakeCrew", "Merging", "ThreadCrew", "Work"]


class Work(ABC):
    """One kind of work on units, which any number of workers share.

    It can be pickled: a worker of another process works with the copy, and its results come back by :meth:`collect` and
    :meth:`receive`.
    """

    @abstractmethod
    def begin(self, shared: Shared, device: torch.device) -> Any:
        """Return a new worker on a device."""

    @abstractmethod
    def do(self, worker: Any, span: Span) -> None:
        """Do one unit of work."""

    def collect(self, worker: Any) -> Any:
        """Return the results of a worker that has done its last unit; they can be pickled."""
        return None

    def receive(self, collected: Sequence[Any], spans: Sequence[Span]) -> None:
        """Join the results of a process's workers with all others. ``spans`` are their units in another process."""
        assert not any(each is not None for each in collected)

    def record(self, span: Span, written: Mapping[str, int], measured: Sequence[float]) -> None:
        """Record a unit that another process finished, the bytes of each tensor that it wrote, and its measures."""
        assert not written and not measured


class Crew(Protocol):
    """The workers of a run, wherever they are."""

    def go_through(self, work: Work, spans: Sequence[Span], on_done: Callable[[Span], None]) -> None:
        """Do the work on all units; ``on_done`` receives each unit that is done, from one thread at a time.

        Raises the first error of any worker. No worker is left running.
        """


MakeCrew = Callable[[Shared], Crew]
"""Makes the crew of a run."""


@dataclass(frozen=True, slots=True)
class ThreadCrew:
    """Threads of this process."""

    shared: Shared
    threads: int

    def go_through(self, work: Work, spans: Sequence[Span], on_done: Callable[[Span], None]) -> None:
        """Do the work on all units, each on the next thread that is free."""
        workers = share_out(
            spans,
            partial(work.begin, self.shared),
            work.do,
            on_done,
            threads=self.threads,
            devices=self.shared.devices,
            size=attrgetter("bytes"),
        )
        collected = [work.collect(worker) for worker in workers]
        del workers  # their buffers are not needed any more
        work.receive(collected, ())


class Gathering(Work):
    """Gathering statistics over the whole model: a stage of them, in one of its sweeps."""

    def __init__(
        self,
        stage: Sequence[Statistic | ResultStatistic],
        sweeps: Sweeps,
        numbers: Mapping[Span, int],
        journal: RunJournal | None,
    ) -> None:
        self.stage, self.sweeps, self.numbers, self.journal = stage, sweeps, numbers, journal

    def __reduce__(self) -> tuple[Any, ...]:
        return _GatheringElsewhere, (self.stage, self.sweeps.start_part().accumulators)

    def begin(self, shared: Shared, device: torch.device) -> tuple[Worker, SweepPart]:
        return Worker(shared, device), self.sweeps.start_part()

    def do(self, worker: tuple[Worker, SweepPart], span: Span) -> None:
        gatherer, part = worker
        gatherer.accumulators = part.accumulators
        gatherer.gather(span, self.stage)
        self.sweeps.add(part, self.numbers[span])
        if self.journal is not None:
            self.journal.check()

    def collect(self, worker: tuple[Worker, SweepPart]) -> SweepPart:
        return worker[1]

    def receive(self, collected: Sequence[SweepPart], spans: Sequence[Span]) -> None:
        self.sweeps.take(collected, [self.numbers[span] for span in spans])
        if self.journal is not None:
            self.journal.check()


@dataclass(frozen=True, slots=True)
class _GatheringElsewhere(Work):
    """Gathering statistics in another process, by empty accumulators."""

    stage: Sequence[Statistic | ResultStatistic]
    empty: Sequence[Accumulator]

    def begin(self, shared: Shared, device: torch.device) -> Worker:
        worker = Worker(shared, device)
        worker.accumulators = [each.fork() for each in self.empty]
        return worker

    def do(self, worker: Worker, span: Span) -> None:
        worker.gather(span, self.stage)

    def collect(self, worker: Worker) -> SweepPart:
        on_gpu = worker.tiler.device.type != "cpu"  # which the program's machine need not have
        return SweepPart([copy_to_host(each) if on_gpu else each for each in worker.accumulators])


@dataclass(frozen=True, slots=True)
class Merging(Work):
    """Merging units and writing them. With a journal, each is recorded under its number.

    With ``counts``, the bytes of each unit are counted, and wait in the worker's sink. ``measures`` receives the
    measures of the merged tensors, if they are wanted.
    """

    journal: RunJournal | None = None
    numbers: Mapping[Span, int] = field(default_factory=dict)
    counts: bool = False
    measures: Measures | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # the journal stays where it is
        return Merging, (None, {}, True, None if self.measures is None else Measures())

    def begin(self, shared: Shared, device: torch.device) -> Worker:
        worker = Worker(shared, device)
        if self.counts or self.journal is not None:
            worker.output.sink = CountingSink(shared.sink)
        if self.measures is not None:
            worker.measure()
        return worker

    def do(self, worker: Worker, span: Span) -> None:
        self.record(span, *self.merge(worker, span))

    def merge(self, worker: Worker, span: Span) -> tuple[Mapping[str, int], list[float]]:
        """Merge a unit. Return the bytes of each tensor that it wrote, where these are counted, and its measures."""
        measured, sink = worker.merge_unit(span), worker.output.sink
        return (sink.take() if isinstance(sink, CountingSink) else {}), measured

    def collect(self, worker: Worker) -> Measures | None:
        return worker.take_measures()

    def receive(self, collected: Sequence[Measures | None], spans: Sequence[Span]) -> None:
        for each in collected:
            if self.measures is not None and each is not None:
                self.measures.merge(each)

    def record(self, span: Span, written: Mapping[str, int], measured: Sequence[float]) -> None:
        if self.journal is not None:
            self.journal.add(self.numbers[span], written, measured)


class Decomposing(Work):
    """Decomposing merged changes. ``measures`` receives the measures of these, if they are wanted."""

    def __init__(self, found: Decomposition, measures: Measures | None = None) -> None:
        self.found, self.measures = found, measures

    def __reduce__(self) -> tuple[Any, ...]:
        return DecomposingElsewhere, (self.found.spool, self.found.widths, self.measures is not None)

    def begin(self, shared: Shared, device: torch.device) -> Worker:
        return self._begin(shared, device, self.found)

    def _begin(self, shared: Shared, device: torch.device, found: Decomposition) -> Worker:
        """Return a new worker that adds to ``found``."""
        worker = Worker(shared, device)
        if self.measures is not None:
            worker.measure()
        worker.output = Decomposer(shared.sink, worker.tiler, shared.discarded, found.notices, found=found)
        return worker

    def do(self, worker: Worker, span: Span) -> None:
        if span.item.form == "factors":
            worker.merge_unit(span)
        elif is_unchanged(span.item):
            _found_by(worker).unchanged.add(span.item.site.name)

    def collect(self, worker: Worker) -> Any:
        return worker.take_measures()

    def receive(self, collected: Sequence[Findings | Measures | None], spans: Sequence[Span]) -> None:
        """Join the measures of workers, and the findings of another process's workers; threads share ``found``."""
        for each in collected:
            if isinstance(each, Findings):
                self.found.spectra |= each.spectra
                self.found.unchanged |= each.unchanged
                self.found.notices |= each.notices
                self.found.spool.restore(each.places)
            measures = each.measures if isinstance(each, Findings) else each
            if self.measures is not None and measures is not None:
                self.measures.merge(measures)


def _found_by(worker: Worker) -> Decomposition:
    """Return the decomposition that a worker adds to."""
    assert isinstance(worker.output, Decomposer)
    return worker.output.found


@dataclass(frozen=True, slots=True)
class Findings:
    """The part of a decomposition that one worker found, with the places of its process's new factors."""

    spectra: Mapping[str, SingularValues]
    unchanged: set[str]
    notices: set[str]
    places: Mapping[str, Any]
    measures: Measures | None


class DecomposingElsewhere(Decomposing):
    """Decomposing merged changes far from the process that chooses the ranks: each worker adds to its own findings."""

    def __init__(self, spool: Spool, widths: Mapping[str, int], measured: bool) -> None:
        self.spool, self.widths = spool, dict(widths)
        self.measures = Measures() if measured else None

    def begin(self, shared: Shared, device: torch.device) -> Worker:
        return self._begin(shared, device, Decomposition(shared.plan, self.spool, widths=self.widths))

    def collect(self, worker: Worker) -> Findings:
        found = _found_by(worker)
        places, measures = self.spool.take_new(), worker.take_measures()
        return Findings(found.spectra, found.unchanged, found.notices, places, measures)
