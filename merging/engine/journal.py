"""The journal of a run: its finished work, from which a later run of the same plan goes on."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from merging.engine.journaled_sinks import EncodingSink, JournaledSink
from merging.engine.spool import Spool
from merging.engine.sweeps import Sweeps, SweepSnapshot
from merging.errors import OutputError
from merging.maths.lazy_torch import Tensor, torch
from merging.os_calls import sync, write_at
from merging.sources.stored import bytes_of

__all__ = ["Journal", "Record", "RunJournal"]

_PERIOD = 5.0
"""Seconds between two entries: the most work that is done again after a kill, except for sweeps of statistics."""

_HAND_IN, _SNAPSHOT = 3, 6
"""Periods after which a thread hands in its values of a sweep, and after which these are written."""

_LEISURE = 50
"""Snapshots of large sweeps are written less often: this many times the time that writing takes is between two."""


class Record(Protocol):
    """The results of a run so far, next to its values: see :class:`~merging.engine.worker.Shared`."""

    statistics: dict[str, Tensor]
    notices: set[str]
    discarded: dict[str, float]
    metrics: dict[str, dict[str, float]]


_FinishedUnit = tuple[Any, ...]
"""A finished unit in plain values: its number, the bytes of each tensor that it wrote, and its measures, if any."""


class Journal:
    """A folder with a journal for each run of a merge: one a stage, and one for the merge itself.

    ``period`` is the number of seconds between two entries.
    """

    def __init__(self, folder: Path, period: float | None = None) -> None:
        self.folder = folder
        self.period = _PERIOD if period is None else period

    def of_run(self, name: str) -> RunJournal:
        """Return the journal of a run, with the entries of former ones."""
        return RunJournal(self.folder, name, self.period)


class RunJournal:
    """The finished work of one run, in lines of JSON. An entry is written when all values in it are durable.

    Units of work are known by their numbers. A thread of its own writes the entries, so that no worker waits for the
    disk. :meth:`begin` starts it, and :meth:`end` stops it.

    Attributes:
        done: the numbers of the finished units.
        measured: the measures of units that former runs finished, where those measured them.
        values: the path of values that the run keeps itself.
        spool: the changes that are set aside.
        snapshot: the path of the finished part of a sweep that gathers statistics.
    """

    def __init__(self, folder: Path, name: str, period: float) -> None:
        self.path = folder / f"{name}.jsonl"
        self.values = folder / f"{name}.values"
        self.spool = Spool(folder, folder / f"{name}.spool")
        self.snapshot = folder / f"{name}.sweep"
        self.period = period
        self.done: set[int] = set()
        self.measured: dict[int, list[float]] = {}
        self._pending: list[_FinishedUnit] = []
        self._held: dict[str, list[_FinishedUnit]] = {}
        self._errors: dict[str, float] = {}
        self._known: set[tuple[str, ...]] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: OSError | None = None
        self._sweeps: Sweeps | None = None
        self._next_snapshot = 0.0
        self._thread: threading.Thread | None = None
        self._fd: int | None = None
        self._end = 0

    def begin(self, sink: JournaledSink, record: Record) -> None:
        """Take up the entries of a former run, if its values are there, and begin to write entries.

        Raises :class:`~merging.errors.OutputError`.
        """
        self._sink, self._record = sink, record
        try:
            entries = _read_entries(self.path) if sink.resumed else []
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            self._end = sum(length for _, length in entries)
            if os.fstat(self._fd).st_size != self._end:
                os.ftruncate(self._fd, self._end)
            if not sink.resumed:
                self.snapshot.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritten(error) from None
        written: Counter[str] = Counter()
        for entry, _ in entries:
            for unit, counts, *numbers in entry["units"]:
                self.done.add(unit)
                if numbers:
                    self.measured[unit] = numbers[0]
                written.update(counts)
            self.spool.restore(entry["spooled"])
            record.statistics |= {name: _parse_tensor(each) for name, each in entry["statistics"].items()}
            record.discarded |= entry["discarded"]
            self._errors |= entry["errors"]
            record.notices |= set(entry["notices"])
            for metric, values in entry["metrics"].items():
                record.metrics.setdefault(metric, {}).update(values)
        sink.credit(written)
        if isinstance(sink, EncodingSink):
            for name, value in self._errors.items():
                sink.restore_error(name, value)
        self._new_facts()  # these are in former entries
        self._thread = threading.Thread(target=self._write_entries, daemon=True)
        self._thread.start()

    def add(self, unit: int, written: Mapping[str, int], numbers: Sequence[float] = ()) -> None:
        """Record a finished unit, the bytes of each tensor that it wrote, and its measures, if there are any.

        Raises :class:`~merging.errors.OutputError` if the last entry could not be written.
        """
        self.check()
        with self._lock:
            self._pending += self._release((unit, written, *([numbers] if numbers else [])))

    def _release(self, entry: _FinishedUnit) -> list[_FinishedUnit]:
        """Return the units whose values are all written: this one, or all of an encoded tensor when it is the last."""
        written, sink = entry[1], self._sink
        encoded = [name for name in written if name in sink.sizes] if isinstance(sink, EncodingSink) else []
        if not isinstance(sink, EncodingSink) or not encoded:
            return [entry]
        (name,) = encoded
        held = self._held.setdefault(name, [])
        held.append(entry)
        if sum(each[1][name] for each in held) < sink.sizes[name]:
            return []
        self._errors[name] = sink.error_of(name)
        return self._held.pop(name)

    def follow(self, sweeps: Sweeps) -> None:
        """Go on with the finished part of these sweeps, and record it now and then from now on.

        Raises :class:`~merging.errors.OutputError` for a disk that fails.
        """
        try:
            former = SweepSnapshot.read(self.snapshot)
        except OSError as error:
            raise self._unwritten(error) from None
        if former is not None:
            sweeps.resume(former)
        if all(total.state() is not None for total in sweeps.totals):
            sweeps.period = _HAND_IN * self.period
            self._next_snapshot = time.monotonic() + _SNAPSHOT * self.period
            self._sweeps = sweeps

    def check(self) -> None:
        """Raise :class:`~merging.errors.OutputError` if the last entry could not be written."""
        if self._error is not None:
            raise self._unwritten(self._error)

    def end(self) -> None:
        """Write the last entry, and close the files. An entry that cannot be written is work that is done again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._fd is not None:
            os.close(self._fd)
        self._thread = self._fd = None

    def _write_entries(self) -> None:
        stopped = False
        while not stopped and self._error is None:
            stopped = self._stop.wait(self.period)
            snapshot = None  # taken before the entry, which then has all that these units set aside
            if self._sweeps is not None and (stopped or time.monotonic() >= self._next_snapshot):
                snapshot = self._sweeps.take_snapshot()
            try:
                self._write_entry()
                if snapshot is not None:
                    self._write_snapshot(snapshot)
            except OSError as error:
                self._error = error

    def _write_entry(self) -> None:
        with self._lock:
            units, self._pending = self._pending, []
        entry = {"units": units, **self._new_facts()}
        if not any(entry.values()):
            return
        self._sink.sync()
        self.spool.sync()
        assert self._fd is not None
        line = json.dumps(entry).encode() + b"\n"
        write_at(self._fd, memoryview(line), self._end)  # all of it: an entry after half of one is never read
        self._end += len(line)
        sync(self._fd)

    def _write_snapshot(self, snapshot: SweepSnapshot) -> None:
        began = time.monotonic()
        snapshot.write(self.snapshot)
        ended = time.monotonic()
        self._next_snapshot = ended + max(_SNAPSHOT * self.period, _LEISURE * (ended - began))

    def _new_facts(self) -> dict[str, Any]:
        """Return the results of the run that are in no entry yet."""
        record = self._record
        metrics = [
            (name, each, value) for name, values in [*record.metrics.items()] for each, value in [*values.items()]
        ]
        facts: dict[str, Any] = {
            "spooled": self._new("spooled", self.spool.places()),
            "statistics": {
                name: _write_tensor(value) for name, value in self._new("statistics", record.statistics).items()
            },
            "discarded": self._new("discarded", record.discarded),
            "errors": self._new("errors", self._errors),
            "notices": list(self._new("notices", dict.fromkeys([*record.notices]))),
            "metrics": {},
        }
        for (name, each), value in self._new("metrics", {(name, each): value for name, each, value in metrics}).items():
            facts["metrics"].setdefault(name, {})[each] = value
        return facts

    def _new(self, kind: str, facts: Mapping[Any, Any]) -> dict[Any, Any]:
        new = {name: value for name, value in [*facts.items()] if (kind, name) not in self._known}
        self._known |= {(kind, name) for name in new}
        return new

    def _unwritten(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path.parent}: finished work cannot be recorded: {error.strerror or error}")


def _read_entries(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Return the whole entries of a journal with their lengths in bytes; what a crash left half written is no entry."""
    entries = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return []
    with file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            entries.append((entry, len(line)))
    return entries


def _write_tensor(values: Tensor) -> list[Any]:
    """Return a tensor in plain values."""
    host = values.detach().contiguous().cpu()
    dtype = str(host.dtype).removeprefix("torch.")
    return [dtype, list(host.shape), base64.b64encode(bytes_of(host.view(-1))).decode()]


def _parse_tensor(plain: list[Any]) -> Tensor:
    dtype, shape, text = plain
    content = bytearray(base64.b64decode(text))
    kind = getattr(torch, dtype)
    values = torch.frombuffer(content, dtype=kind) if content else torch.empty(0, dtype=kind)
    return values.reshape(shape)
