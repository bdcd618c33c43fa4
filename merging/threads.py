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
    begin = threading.Event()  # a thread that is only half started could not be waited for
    errors: list[BaseException] = []
    workers = [make_worker() for _ in range(max(1, min(threads, len(units))))]

    def loop(worker: W) -> None:
        # Every thread merges on its own: torch splitting small operations over more threads would only cost.
        begin.wait()
        torch.set_num_threads(1)
        try:
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

    before = torch.get_num_threads()
    running = [threading.Thread(target=loop, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in running:
            thread.start()
        begin.set()
        for thread in running:
            while thread.is_alive():  # a signal that comes just before a wait is only seen after it
                thread.join(_PATIENCE)
    except BaseException:
        stop.set()
        begin.set()
        if patient:
            _outlast(running)
        raise
    finally:
        torch.set_num_threads(before)
    if errors:
        raise errors[0]
    return workers


def _outlast(threads: Sequence[threading.Thread]) -> None:
    """Wait for threads that were told to stop, through any further Ctrl-C: what they write to will be removed."""
    for thread in threads:
        while thread.is_alive():
            with suppress(KeyboardInterrupt):
                thread.join(_PATIENCE)


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream of the thread's own, so that one thread's copies overlap with another's kernels."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
