"""Work on the units of a run in a process of a cluster: the plan and its files are opened once a process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from merging.cluster import Parcel
from merging.engine.crews import DecomposingElsewhere, Merging, Work
from merging.engine.outputs import Sink
from merging.engine.pieces import PieceReader
from merging.engine.process_memory import keep_freed_memory, private_memory, release_freed_memory
from merging.engine.spool import Spool
from merging.engine.threads import share_out
from merging.engine.transport import unpack
from merging.engine.unit import Span
from merging.engine.worker import Shared
from merging.errors import InputError, OutputError
from merging.maths.lazy_torch import Tensor, torch
from merging.plan.merge_plan import Plan
from merging.plan.stages import all_stages
from merging.storage.placed_files import PlacedFiles
from merging.storage.quantizing_writer import QuantizingWriter
from merging.version import __version__

__all__ = [
    "Batch",
    "BatchResult",
    "RemoteRun",
    "RemoteSweep",
    "check_versions",
    "in_folder",
    "machine_id",
    "versions",
    "work_on",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRun:
    """A run as its workers receive it.

    Attributes:
        plan: the plan.
        sink: the sink, whose files exist.
        devices: the device of each worker.
        spool: the spool of changes that are set aside.
        keeps: whether there is room to keep what wrappers made of factors.
        decomposed: merged changes that were decomposed before.
        threads: the threads of a worker.
        folder: the working folder of the program, since paths may be relative.
    """

    plan: Plan
    sink: Sink
    devices: Sequence[torch.device]
    spool: Spool
    keeps: bool
    decomposed: Spool | None
    threads: int
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSweep:
    """The work of one sweep, with the results that it needs of the sweeps before."""

    work: Work
    statistics: Mapping[str, Tensor]
    places: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Units of work for one worker.

    Attributes:
        run: the bytes of the :class:`RemoteRun`.
        sweep: the bytes of the :class:`RemoteSweep`.
        units: the numbers of items, with the first element and the end of each unit.
        machine: the machine of the program, whose system has the same files in its memory.
        versions: the versions that decide bytes, by name, as the program has them.
    """

    run: Parcel
    sweep: Parcel
    units: tuple[tuple[int, int, int], ...]
    machine: str
    versions: Mapping[str, str]


@dataclass(slots=True, kw_only=True)
class BatchResult:
    """The results of a batch.

    Attributes:
        collected: the results of the worker, as its work collects them.
        written: the bytes of merged values of each tensor, by unit.
        measured: the measures of each unit, if there are any.
        stored: the bytes that were written of each tensor in the files.
        losses: the losses of tensors that were quantised.
        places: the places of changes that were set aside.
        notices: remarks for people.
        stage_notices: remarks on the stages that are computed when they are read.
        discarded: the shares of energy that a lower rank discards.
        metrics: numbers that methods report.
        kernels: the kernels of the worker's processor.
    """

    collected: list[Any]
    written: list[Mapping[str, int]]
    measured: list[list[float]]
    stored: Mapping[str, int]
    losses: Mapping[str, Any]
    places: Mapping[str, Any]
    notices: set[str]
    stage_notices: list[set[str]]
    discarded: dict[str, float]
    metrics: dict[str, dict[str, float]]
    kernels: str


@dataclass(slots=True)
class _OpenedRun:
    """The run that this process works for, and the sweep."""

    key: str
    run: RemoteRun
    shared: Shared
    most_memory: int
    sweep_key: str = ""
    sweep: RemoteSweep | None = field(default=None)


_opened: _OpenedRun | None = None
"""The last run of this process: opening one takes longer than most batches."""


def work_on(batch: Batch) -> BatchResult:
    """Do the units of a batch, and return the results.

    The units' values are durable, or in the memory of a system that the program shares.

    Raises:
        MergingError: for values that cannot be merged, for files that this machine does not see, and for other
            versions than the program's.
    """
    check_versions(batch.versions)
    opened = _open(batch)
    shared, run = opened.shared, opened.run
    assert opened.sweep is not None
    work = opened.sweep.work
    spans = [Span(run.plan.items[item], start, stop) for item, start, stop in batch.units]
    merged: dict[Span, tuple[Mapping[str, int], list[float]]] = {}

    def do(worker: Any, span: Span) -> None:
        if isinstance(work, Merging):
            merged[span] = work.merge(worker, span)
        else:
            work.do(worker, span)

    shared.notices, shared.discarded, shared.metrics = set(), {}, {}
    with in_folder(run.folder):
        workers = share_out(
            spans, partial(work.begin, shared), do, lambda _: None, threads=run.threads, devices=run.devices
        )
        collected = [work.collect(worker) for worker in workers]
        del workers
        files = _files_of(run.sink)
        spools = [run.spool, run.decomposed, work.spool if isinstance(work, DecomposingElsewhere) else None]
        _hand_over([each for each in (files, *spools) if each is not None], batch.machine != machine_id())
    if private_memory() > opened.most_memory:
        release_freed_memory()
    return BatchResult(
        collected=collected,
        written=[merged[span][0] if span in merged else {} for span in spans],
        measured=[merged[span][1] if span in merged else [] for span in spans],
        stored=files.take_written() if files else {},
        losses=run.sink.take_losses() if isinstance(run.sink, QuantizingWriter) else {},
        places=shared.spool.take_new(),
        notices=shared.notices,
        stage_notices=[_take_notices(reader) for reader in piece_readers(run.plan)],
        discarded=shared.discarded,
        metrics=shared.metrics,
        kernels=torch.backends.cpu.get_cpu_capability(),
    )


def _open(batch: Batch) -> _OpenedRun:
    """Open the run of a batch and its sweep, unless this process has them."""
    global _opened
    if _opened is None or _opened.key != batch.run.key:
        keep_freed_memory()
        _opened = None  # its files are closed first
        run: RemoteRun = unpack(batch.run.fetch())
        shared = Shared(run.plan, run.sink, run.devices, run.spool, keeps=run.keeps, decomposed=run.decomposed)
        _opened = _OpenedRun(batch.run.key, run, shared, private_memory() + run.plan.memory(run.threads))
    if _opened.sweep_key != batch.sweep.key:
        sweep: RemoteSweep = unpack(batch.sweep.fetch())
        _opened.sweep_key, _opened.sweep = batch.sweep.key, sweep
        _opened.shared.statistics = dict(sweep.statistics)
        _opened.shared.spool.restore(sweep.places)
    return _opened


def _hand_over(files: Sequence[PlacedFiles | Spool], far: bool) -> None:
    """Close the files that others read next, and make them durable where this machine alone has the values."""
    try:
        if far:
            for each in files:
                each.sync()
    except OSError as error:
        raise OutputError(f"merged values cannot be written on {os.uname().nodename}: {error.strerror}") from None
    finally:
        for each in files:
            each.close()


def _files_of(sink: Sink) -> PlacedFiles | None:
    inner = sink.writer if isinstance(sink, QuantizingWriter) else sink
    return inner if isinstance(inner, PlacedFiles) else None


def piece_readers(plan: Plan) -> list[PieceReader]:
    """Return the readers of the plan's stages that are computed when they are read, in the order of the stages."""
    readers = [stage.values.reader for stage in all_stages(plan.stages)]
    return [reader for reader in readers if isinstance(reader, PieceReader)]


def _take_notices(reader: PieceReader) -> set[str]:
    taken = set(reader.notices)
    reader.notices.clear()  # its workers share the set
    return taken


def versions() -> dict[str, str]:
    """Return the versions that decide an output's bytes, by name."""
    return {"merging": __version__, "torch": str(torch.__version__)}


def check_versions(wanted: Mapping[str, str]) -> None:
    """Refuse to work with other versions than the program. Raises :class:`~merging.errors.InputError`."""
    for name, version in versions().items():
        if version != wanted[name]:
            raise InputError(
                f"{os.uname().nodename}: has {name} {version}, and the program {wanted[name]}: install the same "
                f"version on every node of the cluster"
            )


def machine_id() -> str:
    """Return a text that differs from machine to machine, and after each start of one."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Work in the program's working folder, if this machine has it, as paths may be relative to it."""
    before = Path.cwd()
    with suppress(OSError):
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
