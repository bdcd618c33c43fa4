"""Sharing work out over threads: each takes the next piece, and an error or Ctrl-C stops them all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TypeVar

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
    make_worker: Callable[[], W],
    work: Callable[[W, U], None],
    on_done: Callable[[U], None],
    *,
    threads: int,
    device: torch.device,
    stop: threading.Event | None = None,
) -> list[W]:
    """Run ``work(worker, unit)`` for every unit, on several threads.

    Args:
        units: the units of work, which threads take in order.
        make_worker: makes the worker of each thread.
        work: does one unit.
        on_done: receives every unit that is done, from one thread at a time.
        threads: the number of threads.
        device: the device that the work uses; on a GPU each thread has a stream of its own.
        stop: an event that is set when the work is to stop, for work that looks at it. Ctrl-C then does not wait for
            the end of a long unit.

    Returns:
        The workers.

    Raises:
        BaseException: the first error of any thread, which stops all of them.
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
    """Wait for threads to stop, through any further Ctrl-C, since the files that they write are removed next."""
    for ended in ends:
        while not ended.is_set():
            with suppress(KeyboardInterrupt):
                ended.wait(_PATIENCE)


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a stream of the thread's own, so that one thread's copies overlap with another's kernels."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
