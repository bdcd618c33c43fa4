"""Sharing work out over threads: each takes the next piece, an error or Ctrl-C stops them all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TypeVar

import torch

__all__ = ["Progress", "cores", "share_out"]

W = TypeVar("W")
U = TypeVar("U")

_PATIENCE = 0.2
"""Seconds after which a signal is noticed at the latest."""

Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes in all, from one thread at a time."""


def cores() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_out(
    units: Sequence[U],
    make_worker: Callable[[], W],
    work: Callable[[W, U], None],
    report: Callable[[U], None],
    *,
    threads: int,
    device: torch.device,
    stop: threading.Event | None = None,
) -> list[W]:
    """Have ``work(worker, unit)`` done for every unit by so many threads, each with a worker of its own.

    ``report`` is told of every unit done. The first error stops all threads and is raised here. Returns the workers.
    ``stop`` is set then: an event that the work itself looks at, so that Ctrl-C need not wait for a long unit's end.
    """
    pending = iter(units)
    lock = threading.Lock()
    patient = stop is None
    stop = stop or threading.Event()
    begin = threading.Event()  # nothing is begun before all threads are there: half started ones cannot be waited for
    errors: list[BaseException] = []
    workers = [make_worker() for _ in range(max(1, min(threads, len(units))))]

    def loop(worker: W, ended: threading.Event) -> None:
        begin.wait()
        try:
            if stop.is_set():
                return
            # Every thread merges on its own: torch splitting small operations over more threads would only cost.
            torch.set_num_threads(1)
            with torch.inference_mode(), _stream(device):
                while not stop.is_set():
                    with lock:
                        unit = next(pending, None)
                    if unit is None:
                        return
                    work(worker, unit)
                    with lock:
                        report(unit)
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            ended.set()

    before = torch.get_num_threads()
    # Python before 3.13 takes a thread for ended when a signal interrupts its join(), so each says itself when it is.
    ends = [threading.Event() for _ in workers]
    try:
        for worker, ended in zip(workers, ends, strict=True):
            threading.Thread(target=loop, args=(worker, ended), daemon=True).start()
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


def _outlast(ends: Sequence[threading.Event]) -> None:
    """Wait for threads that were told to stop, through any further Ctrl-C: what they write to will be removed."""
    for ended in ends:
        while not ended.is_set():
            with suppress(KeyboardInterrupt):
                ended.wait(_PATIENCE)


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream of the thread's own, so that one thread's copies overlap with another's kernels."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
