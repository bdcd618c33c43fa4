"""Running the stages of a plan: computed piece by piece when they are read, or set aside before the plan runs."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from merging.display.progress import Progress, announce_phase
from merging.engine.crews import MakeCrew
from merging.engine.devices import main_device
from merging.engine.journal import Journal
from merging.engine.pieces import PieceReader
from merging.engine.run import run, work_bytes
from merging.engine.sanity import unrelated_models
from merging.errors import OutputError
from merging.maths.lazy_torch import Tensor, torch
from merging.methods.families.dropping import Dropping
from merging.os_calls import read_at, sync, write_at
from merging.plan.checks import make_content_keys
from merging.plan.merge_plan import Plan
from merging.plan.stages import Stage, all_stages
from merging.sources.stored import Stored, bytes_of
from merging.storage.placed_files import PlacedFiles, TensorPlace
from merging.storage.scratch import open_scratch

__all__ = ["KeepStage", "StageSettings", "open_stages"]

KeepStage = Callable[[Stage, "Progress | None"], Mapping[str, Stored]]
"""Writes a stage as a model of its own, and returns the tensors in its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """How stages are run.

    Attributes:
        devices: the devices to compute on, of one kind; the CPU by default.
        threads: the number of workers of a stage that is set aside.
        scratch: the folder for stages that are set aside.
        progress: called with the bytes done and the bytes in all.
        keep: writes a stage as a model of its own; None if stages are not kept.
        journal: the finished work of former runs of the merge; None if no later run can go on.
        make_crew: makes the workers of each run; by default threads of this process.
    """

    devices: Sequence[torch.device] = ()
    threads: int = 1
    scratch: Path | None = None
    progress: Progress | None = None
    keep: KeepStage | None = None
    journal: Journal | None = None
    make_crew: MakeCrew | None = None


@contextmanager
def open_stages(plan: Plan, settings: StageSettings) -> Iterator[tuple[Plan, Progress | None, list[str]]]:
    """Have the values of a plan's stages readable while the body runs.

    Yields the plan to run, with keys of its stages' contents; the callback for its progress; and a list that has the
    stages' remarks when the body has ended.

    Raises:
        MergingError: for values that cannot be merged, and a disk that is full.
    """
    stages = all_stages(plan.stages)
    if not stages:
        yield plan, settings.progress, []
        return
    device = main_device(settings.devices)
    aside = [stage for stage in stages if settings.keep or not stage.lazy]
    parts = _Parts(settings.progress, [work_bytes(each, device) for each in [*(s.plan for s in aside), plan]])
    remarks: list[str] = []
    try:
        for stage in stages:
            stage.plan = _with_content_keys(stage.plan)
            remarks += _place(stage, [*stage.plan.notices, *unrelated_models(stage.plan)])
            if stage not in aside:
                stage.values.reader = PieceReader(stage.plan, device)
                continue
            reader = _set_aside(stage, settings, parts.next())
            stage.values.reader = reader
            remarks += _place(stage, reader.notices)
            later = aside[aside.index(stage) + 1 :]
            needed = _find_needed([*(each.plan for each in later), plan], aside)
            for each in aside:
                if each not in needed and each not in later:
                    _close(each)  # a file with a name stays until the end, for runs that go on
        yield _with_content_keys(plan), parts.next(), remarks
        for stage in stages:
            reader_of = stage.values.reader
            remarks += _place(stage, sorted(reader_of.notices)) if isinstance(reader_of, PieceReader) else []
    finally:
        for stage in stages:
            _close(stage)


def _with_content_keys(plan: Plan) -> Plan:
    """Return a plan with keys of its models' contents, where random numbers need them: stages had none before."""
    if not any(isinstance(link, Dropping) for link in plan.recipe.method.links()):
        return plan
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers, since products have other last bits on several threads
    try:
        return replace(plan, keys=make_content_keys(plan.models)[0])
    finally:
        torch.set_num_threads(threads)


def _find_needed(plans: Sequence[Plan], aside: Collection[Stage]) -> set[Stage]:
    """Return the stages set aside that plans read, directly or through stages that compute or hand on tensors then."""
    found: set[Stage] = set()
    for stage in (stage for plan in plans for stage in plan.stages):
        found |= {stage} & set(aside)
        if stage not in aside or any(item.form == "copy" for item in stage.plan.items):
            found |= _find_needed([stage.plan], aside)
    return found


def _place(stage: Stage, remarks: Sequence[str]) -> list[str]:
    """Return a stage's remarks with its place in the recipe."""
    return [
        f"{'warning: ' * remark.startswith('warning: ')}{stage.name}: {remark.removeprefix('warning: ')}"
        for remark in remarks
    ]


def _close(stage: Stage) -> None:
    reader, stage.values.reader = stage.values.reader, None
    if isinstance(reader, _AsideFile):
        reader.close()


def _set_aside(stage: Stage, settings: StageSettings, progress: Progress | None) -> _AsideFile | _KeptTensors:
    if settings.keep is not None:
        return _KeptTensors(settings.keep(stage, progress))
    journal = settings.journal.of_run(f"stage {stage.name}") if settings.journal else None
    path = journal.values if journal else None
    if path is None and settings.make_crew and settings.scratch:  # other processes write to it
        path = settings.scratch / f"stage {stage.name}.values"
    file = _AsideFile(stage.plan, settings.scratch, path)
    try:
        done = run(
            stage.plan,
            file,
            devices=settings.devices,
            threads=settings.threads,
            progress=progress,
            scratch=settings.scratch,
            journal=journal,
            make_crew=settings.make_crew,
        )
    except BaseException:
        file.close()
        raise
    file.notices += [*done.notices, *done.energy_notices]
    return file


class _Parts:
    """Progress over several runs, one after the other."""

    def __init__(self, progress: Progress | None, totals: Sequence[int]) -> None:
        self.progress, self.totals, self.number = progress, totals, -1

    def next(self) -> Progress | None:
        """Return the callback of the next run."""
        self.number += 1
        if self.progress is None:
            return None
        before, total, progress = sum(self.totals[: self.number]), sum(self.totals), self.progress
        return _OneOfRuns(progress, before, total)


class _OneOfRuns:
    """A callback for one of several runs."""

    def __init__(self, progress: Progress, before: int, total: int) -> None:
        self.progress, self.before, self.total = progress, before, total

    def phase(self, name: str) -> None:
        announce_phase(self.progress, name)

    def __call__(self, done: int, total: int) -> None:
        self.progress(self.before + done, self.total)


class _KeptTensors:
    """Tensors of a stage that was written as a model of its own."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        self.notices: list[str] = []

    def read(self, name: str, buffer: Tensor, start: int) -> None:
        self.tensors[name].read_into(buffer, start)

    def advise(self, name: str, start: int, count: int) -> None:
        self.tensors[name].advise(start, count)


class _AsideFile:
    """Tensors of a stage in a file without a name: it is gone when the program ends, in any way.

    With a ``path`` the file has a name, and ``resumed`` says whether a former run left it.
    """

    def __init__(self, plan: Plan, folder: Path | None, path: Path | None = None) -> None:
        self.notices: list[str] = []
        self.resumed = path is not None and path.exists()
        self._folder, self._path = folder, path
        self._starts: dict[str, int] = {}
        end = 0
        for out in plan.outs:
            self._starts[out.name] = end
            end += out.nbytes
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        assert self._path is not None, "a file without a name has no other reader"
        self._open()
        path = self._path.absolute()
        return PlacedFiles, ({name: TensorPlace(path, start) for name, start in self._starts.items()},)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take elements of a tensor."""
        try:
            write_at(self._open().fileno(), bytes_of(values), self._starts[name] + start * values.itemsize)
        except OSError as error:
            raise OutputError(
                f"{self._folder or tempfile.gettempdir()}: a stage cannot be set aside: {error.strerror}"
            ) from None

    def _open(self) -> IO[bytes]:
        with self._lock:
            if self._file is None:
                self._file = open_scratch(self._folder, self._path)
            return self._file

    def credit(self, written: Mapping[str, int]) -> None:
        """Do nothing: a run writes every tensor, or a former one has."""

    def sync(self) -> None:
        """Make the values durable. Raises OSError."""
        if self._file is not None:
            sync(self._file.fileno())

    def read(self, name: str, buffer: Tensor, start: int) -> None:
        """Fill a buffer with elements of a tensor."""
        try:
            read_at(self._open().fileno(), bytes_of(buffer), self._starts[name] + start * buffer.itemsize)
        except (OSError, EOFError) as error:
            raise OutputError(f"{self._folder}: a stage that was set aside cannot be read: {error}") from None

    def advise(self, name: str, start: int, count: int) -> None:
        """Do nothing: what was written just now is in the system's memory, as far as there is room."""

    def close(self) -> None:
        """Free the space."""
        if self._file is not None:
            self._file.close()
