"""Sharing work out over threads: each takes the next piece, and an error or Ctrl-C stops them all."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import cycle, islice
from typing import Generic, TypeVar

from merging.engine.devices import computing_on
from merging.maths.lazy_torch import torch

__all__ = ["cores", "share_out"]

W = TypeVar("W")
U = TypeVar("U")

_PATIENCE = 0.2
"""Seconds after which a signal is noticed at the latest."""


def cores() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_out(
    units: Sequence[U],
    make_worker: Callable[[torch.device], W],
    work: Callable[[W, U], None],
    on_done: Callable[[U], None],
    *,
    threads: int,
    devices: Sequence[torch.device] = (),
    size: Callable[[U], int] = lambda unit: 1,
    stop: threading.Event | None = None,
) -> list[W]:
    """Run ``work(worker, unit)`` for every unit, on several threads.

    Args:
        units: the units of work, which threads take in order.
        make_worker: makes the worker of each thread, for its device.
        work: does one unit.
        on_done: receives every unit that is done, from one thread at a time.
        threads: the number of threads.
        devices: the devices that the threads use in turn; the CPU by default. On a GPU each thread has a stream of its
            own.
        size: the size of a unit, by which devices share the units.
        stop: an event that is set when the work is to stop, for work that looks at it. Ctrl-C then does not wait for
            the end of a long unit.

    Returns:
        The workers.

    Raises:
        BaseException: the first error of any thread, which stops all of them.
    """
    used = list(islice(cycle(devices or [torch.device("cpu")]), max(1, min(threads, len(units)))))
    workers = [make_worker(device) for device in used]
    pending = _Pending(units, used, size)
    lock = threading.Lock()
    patient = stop is None
    stop = stop or threading.Event()
    begin = threading.Event()  # nothing is begun before all threads are there: half started ones cannot be waited for
    errors: list[BaseException] = []

    def loop(worker: W, device: torch.device, ended: threading.Event) -> None:
        begin.wait()
        try:
            if stop.is_set():
                return
            # Every thread merges on its own: torch splitting small operations over more threads would only cost.
            torch.set_num_threads(1)
            with torch.inference_mode(), computing_on(device):
                while not stop.is_set():
                    with lock:
                        if not pending:
                            return
                        unit = pending.take(device)
                    work(worker, unit)
                    with lock:
                        on_done(unit)
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            ended.set()

    before = torch.get_num_threads()
    # Python before 3.13 takes a thread for ended when a signal interrupts its join(), so each says itself when it is.
    ends = [threading.Event() for _ in workers]
    try:
        for worker, device, ended in zip(workers, used, ends, strict=True):
            threading.Thread(target=loop, args=(worker, device, ended), daemon=True).start()
        begin.set()
        for ended in ends:
            while not ended.wait(_PATIENCE):  # a signal that comes just before a wait is only seen after it
                pass
    except BaseException:
        stop.set()
        begun = begin.is_set()
        begin.set()
        if patient and begun:
            _outlast(ends)
        raise
    finally:
        torch.set_num_threads(before)
    if errors:
        raise errors[0]
    return workers


class _Pending(Generic[U]):
    """Units that no thread has taken, shared among devices by size; a device without any left takes another's next.

    So a unit is mostly merged where its statistics were gathered, and its transformed factors are kept.
    """

    def __init__(self, units: Sequence[U], devices: Iterable[torch.device], size: Callable[[U], int]) -> None:
        self._units: dict[torch.device, deque[U]] = {device: deque() for device in devices}
        loads = dict.fromkeys(self._units, 0)
        for unit in units:
            device = min(loads, key=loads.__getitem__)
            self._units[device].append(unit)
            loads[device] += size(unit)

    def __bool__(self) -> bool:
        return any(self._units.values())

    def take(self, device: torch.device) -> U:
        """Remove and return the next unit for a device."""
        return (self._units[device] or max(self._units.values(), key=len)).popleft()


def _outlast(ends: Sequence[threading.Event]) -> None:
    """Wait for threads to stop, through any further Ctrl-C, since the files that they write are removed next."""
    for ended in ends:
        while not ended.is_set():
            with suppress(KeyboardInterrupt):
                ended.wait(_PATIENCE)
