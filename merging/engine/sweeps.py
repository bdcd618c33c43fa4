"""Sweeps over a model that gather statistics, and their finished part, from which a later run goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

from merging.maths.lazy_torch import torch
from merging.maths.reductions import Accumulator, State
from merging.os_calls import sync, sync_folder

__all__ = ["SweepPart", "SweepSnapshot", "Sweeps", "copy_to_host"]

_HEADER = "header"

U = TypeVar("U")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSnapshot:
    """The finished part of a sweep.

    Attributes:
        names: the statistics that the sweep gathers.
        sweep: its number, from 0.
        done: the numbers of the units of work that were gone through.
        states: the values gathered from these units, one state a statistic.
    """

    names: list[str]
    sweep: int
    done: list[int]
    states: list[State]

    def write(self, path: Path) -> None:
        """Replace the file at a path by this snapshot, durably. Raises OSError."""
        import numpy

        header = {
            "names": self.names,
            "sweep": self.sweep,
            "done": self.done,
            "states": [[state.plain, len(state.tensors)] for state in self.states],
        }
        tensors = [tensor for state in self.states for tensor in state.tensors]
        arrays: dict[str, Any] = {str(number): tensor.numpy() for number, tensor in enumerate(tensors)}
        arrays[_HEADER] = numpy.frombuffer(json.dumps(header).encode(), dtype=numpy.uint8)
        new = path.with_name(f"{path.name}.new")
        with new.open("wb") as file:
            numpy.savez(file, **arrays)
            file.flush()
            sync(file.fileno())
        new.replace(path)
        sync_folder(path.parent)

    @classmethod
    def read(cls, path: Path) -> SweepSnapshot | None:
        """Return the snapshot in a file; None if there is none, or not a whole one. Raises OSError."""
        import numpy

        try:
            with path.open("rb") as file, numpy.load(file, allow_pickle=False) as arrays:
                header = json.loads(arrays[_HEADER].tobytes())
                tensors = [torch.from_numpy(arrays[name]) for name in arrays.files if name != _HEADER]
        except (FileNotFoundError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        states = []
        for plain, count in header.pop("states"):
            states.append(State(plain, tensors[:count]))
            tensors = tensors[count:]
        return cls(**header, states=states)


class SweepPart:
    """One thread's part of a sweep: what it gathered since it handed its values in, and the units of these."""

    def __init__(self, accumulators: list[Accumulator]) -> None:
        self.renew(accumulators)

    def renew(self, accumulators: list[Accumulator]) -> None:
        """Begin with empty accumulators."""
        self.accumulators = accumulators
        self.done: list[int] = []
        self.since = time.monotonic()


class Sweeps:
    """The sweeps that gather some statistics, which several threads feed.

    A thread adds the values of its units to a :class:`SweepPart`, and hands it in every ``period`` seconds, or
    never if no snapshots are taken.

    Attributes:
        totals: the accumulators, one a statistic.
        number: the number of the current sweep, from 0.
    """

    def __init__(self, names: Sequence[str], totals: Sequence[Accumulator]) -> None:
        self.names, self.totals = list(names), list(totals)
        self.number = 0
        self.period: float | None = None
        self._done: set[int] = set()
        self._news = False
        self._lock = threading.Lock()

    def resume(self, snapshot: SweepSnapshot) -> None:
        """Go on with the finished part of a former run, if it gathered the same statistics."""
        if snapshot.names != self.names:
            return
        for total, state in zip(self.totals, snapshot.states, strict=True):
            total.restore(state)
        self.number, self._done = snapshot.sweep, set(snapshot.done)

    def split(self, units: Sequence[U]) -> tuple[list[U], list[tuple[int, U]]]:
        """Return the units that this sweep has gone through, and the other ones with their numbers."""
        left = [(number, unit) for number, unit in enumerate(units) if number not in self._done]
        return [units[number] for number in self._done], left

    def start_part(self) -> SweepPart:
        """Return an empty part for a thread."""
        return SweepPart(self._fork())

    def add(self, part: SweepPart, number: int) -> None:
        """Note a unit whose values a part has, and take the part's values over when it is time."""
        part.done.append(number)
        if self.period is None or time.monotonic() - part.since < self.period:
            return
        # on the CPU: a device's values are only in order within the stream of their thread
        taken = [copy_to_host(each) for each in part.accumulators]
        with self._lock:
            self._merge(taken)
            self._done.update(part.done)
            self._news = True
            part.renew(self._fork())

    def take(self, parts: Sequence[SweepPart], done: Iterable[int] = ()) -> None:
        """Take over the values of parts, which must not be used afterwards, and their units.

        ``done`` are units whose values are in these parts, in any of them: no snapshot has the values of a part alone.
        """
        with self._lock:
            for part in parts:
                self._merge(part.accumulators)
                self._done.update(part.done)
            self._done.update(done)
            self._news = True

    def end_sweep(self) -> bool:
        """End the sweep, whose parts were taken, and return whether the model must be gone through once more."""
        with self._lock:
            unfinished = [total.next() for total in self.totals]  # every one must end its sweep
            self.number, self._done, self._news = self.number + 1, set(), any(unfinished)
            self.period = self.period if self._news else None
            return self._news

    def take_snapshot(self) -> SweepSnapshot | None:
        """Return the finished part; None if nothing was added since the last call."""
        with self._lock:
            if not self._news:
                return None
            self._news = False
            states = [state for total in self.totals if (state := total.state()) is not None]
            return SweepSnapshot(names=self.names, sweep=self.number, done=sorted(self._done), states=states)

    def _fork(self) -> list[Accumulator]:
        return [total.fork() for total in self.totals]

    def _merge(self, accumulators: Iterable[Accumulator]) -> None:
        for total, each in zip(self.totals, accumulators, strict=True):
            total.merge(each)


def copy_to_host(accumulator: Accumulator) -> Accumulator:
    """Return an accumulator with the same values, on the CPU; of a kind without states, the same accumulator."""
    state, copy = accumulator.state(), accumulator.fork()
    if state is None:
        return accumulator
    copy.restore(state)
    return copy
