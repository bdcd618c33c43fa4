"""The crew of a run on a Ray cluster: batches of units for its workers, and their results put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol, TypeVar, cast

from merging.cluster import Parcel, RayCluster, WorkerLost, connect, map_tasks
from merging.cluster.connection import count_workers
from merging.engine.crews import Work
from merging.engine.remote_work import (
    Batch,
    BatchResult,
    RemoteRun,
    RemoteSweep,
    machine_id,
    piece_readers,
    versions,
    work_on,
)
from merging.engine.resources import workers_within
from merging.engine.transport import pack
from merging.engine.unit import Span
from merging.engine.worker import Shared
from merging.errors import InputError, OptionError, option
from merging.maths.lazy_torch import torch
from merging.object_stores.store_path import StorePath
from merging.plan.merge_plan import Plan
from merging.storage.quantizing_writer import QuantizingWriter

__all__ = ["ClusterCrew", "ClusterSettings", "fit_workers", "give_gpus", "open_connection", "pick_cluster_devices"]

U = TypeVar("U")

_PARTS = 16
"""Batches for each worker in a sweep: the last of them, which may run alone, are a small part of all."""

_LARGEST = 1 << 28
"""Bytes that a batch reads at most, which are read again when its worker dies."""


class _CreditedSink(Protocol):
    """A sink that other processes write to as well."""

    def credit(self, written: Mapping[str, int]) -> None:
        """Count bytes of tensors as written."""


_IMPORTS = 400_000_000
"""Bytes of memory that a worker takes before it merges, for the packages that it imports."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """A cluster, and the threads of each worker on it."""

    cluster: RayCluster
    threads: int

    def make_crew(self, shared: Shared) -> ClusterCrew:
        """Return the crew of a run."""
        return ClusterCrew(self.cluster, self.threads, shared)


def open_connection(settings: ClusterSettings | None) -> AbstractContextManager[object]:
    """Return a context with a connection to a cluster, if there is one."""
    return nullcontext() if settings is None else connect(settings.cluster)


def fit_workers(
    plan: Plan,
    cluster: RayCluster | None,
    device: torch.device,
    max_memory: int | str | None,
    more: int = 0,
    *,
    destination: Path,
    stream: bool = False,
) -> ClusterSettings | None:
    """Return a cluster's settings for a plan: Ray reserves the memory of each worker, and one GPU where it needs one.

    ``more`` is the memory that each thread takes in addition to the plan's own.

    Raises:
        OptionError: if not even a worker with one thread fits into ``max_memory``, for files that are downloaded in
            the middle of a merge, and for an output in an object store.
    """
    if cluster is None:
        return None
    if stream:
        raise OptionError(f"{option('stream', True)} downloads for one machine: leave it out with a cluster")
    if isinstance(destination, StorePath):
        raise OptionError(
            f"{destination}: the workers of a cluster write to a shared file system: choose another {option('output')}"
        )
    threads = cluster.threads if max_memory is None else workers_within(plan, cluster.threads, max_memory, more)
    memory = cluster.memory or plan.memory(threads) + threads * more + _IMPORTS
    return ClusterSettings(replace(give_gpus(cluster, device), memory=memory), threads)


def give_gpus(cluster: RayCluster, device: torch.device) -> RayCluster:
    """Return a cluster whose workers take one GPU each where they need one, unless its settings state a share."""
    return replace(cluster, worker_gpus=cluster.worker_gpus or (0 if device.type == "cpu" else 1))


def pick_cluster_devices(name: str | torch.device) -> tuple[torch.device, ...]:
    """Return the device of each worker, which this machine need not have. Ray says which GPU each of them takes.

    Raises :class:`~merging.errors.OptionError` for other names than ``cpu`` and ``cuda``.
    """
    if str(name) not in ("cpu", "cuda"):
        raise OptionError(
            f"{option('device', str(name))}: the workers of a cluster run on cpu or cuda, and Ray numbers their GPUs"
        )
    return (torch.device(str(name)),)


class ClusterCrew:
    """The workers of a Ray cluster. They open the run's files themselves, so that no values pass the program."""

    def __init__(self, cluster: RayCluster, threads: int, shared: Shared) -> None:
        self.cluster, self.threads, self.shared = cluster, threads, shared
        self._items = {id(item): number for number, item in enumerate(shared.plan.items)}
        self._run: Parcel | None = None
        self._kernels = {torch.backends.cpu.get_cpu_capability()}

    def go_through(self, work: Work, spans: Sequence[Span], on_done: Callable[[Span], None]) -> None:
        """Do the work on all units, in batches on the workers that are free.

        Raises:
            InputError: for a unit whose workers died again and again.
            MergingError: the first error of any worker.
        """
        if not spans:
            return
        shared = self.shared
        of_unit = {self._unit(span): span for span in spans}
        with connect(self.cluster) as ray:
            self._run = self._run or Parcel.put(pack(self._remote_run()))
            sweep = RemoteSweep(work=work, statistics=shared.statistics, places=shared.spool.places())
            first = Batch(
                run=self._run, sweep=Parcel.put(pack(sweep)), units=(), machine=machine_id(), versions=versions()
            )
            batches = (
                replace(first, units=tuple(map(self._unit, part)))
                for part in self._divide(spans, count_workers(ray, self.cluster))
            )
            try:
                with closing(map_tasks(work_on, batches, self.cluster, split=self._split)) as results:
                    for batch, result in results:
                        done = [of_unit[unit] for unit in batch.units]
                        self._receive(result, work, done)
                        for span in done:
                            on_done(span)
            except WorkerLost as lost:
                name = of_unit[lost.task.units[0]].item.site.name
                raise InputError(
                    f"{name}: {lost}: leave the tensor out with {option('exclude')}, or give the workers more memory"
                ) from None

    def _remote_run(self) -> RemoteRun:
        shared = self.shared
        return RemoteRun(
            plan=replace(shared.plan, sized=None),
            sink=shared.sink,
            devices=shared.devices,
            spool=shared.spool,
            keeps=shared.keeps,
            decomposed=shared.decomposed,
            threads=self.threads,
            folder=Path.cwd(),
        )

    def _unit(self, span: Span) -> tuple[int, int, int]:
        return self._items[id(span.item)], span.start, span.stop

    def _divide(self, spans: Sequence[Span], workers: int) -> Iterator[list[Span]]:
        """Yield batches of about equal size, in order."""
        groups = self._group(spans, lambda span: id(span.item))
        size = min(_LARGEST, sum(span.bytes for span in spans) // (workers * _PARTS))
        batch: list[Span] = []
        for group in groups:
            batch += group
            if sum(span.bytes for span in batch) >= size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _split(self, batch: Batch) -> list[Batch]:
        """Return a batch in its smallest parts."""
        return [replace(batch, units=tuple(group)) for group in self._group(batch.units, itemgetter(0))]

    def _group(self, units: Sequence[U], item_of: Callable[[U], object]) -> list[list[U]]:
        """Return units one by one, or by tensor where values are encoded: one process needs all pieces of a code."""
        if not isinstance(self.shared.sink, QuantizingWriter):
            return [[unit] for unit in units]
        return [[*group] for _, group in groupby(units, key=item_of)]

    def _receive(self, result: BatchResult, work: Work, spans: Sequence[Span]) -> None:
        """Join the results of a batch with all others."""
        shared = self.shared
        shared.notices |= result.notices
        shared.discarded |= result.discarded
        for metric, values in result.metrics.items():
            shared.metrics.setdefault(metric, {}).update(values)
        for reader, notices in zip(piece_readers(shared.plan), result.stage_notices, strict=True):
            reader.notices |= notices
        shared.spool.restore(result.places, written=True)
        work.receive(result.collected, spans)
        sink: object = shared.sink
        if isinstance(sink, QuantizingWriter):
            sink.add_losses(result.losses)
            sink = sink.writer
        if result.stored:
            cast(_CreditedSink, sink).credit(result.stored)
        for span, written, measured in zip(spans, result.written, result.measured, strict=True):
            work.record(span, written, measured)
        self._note_kernels(result.kernels)

    def _note_kernels(self, kernels: str) -> None:
        if kernels not in self._kernels:
            self._kernels.add(kernels)
            self.shared.notices.add(
                f"warning: the nodes calculate with different kernels ({', '.join(sorted(self._kernels))}), which "
                f"round differently: set ATEN_CPU_CAPABILITY alike on all nodes for the same bytes each time"
            )
