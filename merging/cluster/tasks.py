"""A map over tasks on a Ray cluster, which schedules them: bounded, repeated where workers die, and cancelled whole."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import uuid4

from merging.cluster.connection import connect, count_workers, first_sentence, import_ray
from merging.cluster.settings import RayCluster
from merging.errors import InputError, MergingError, words_of_reader

__all__ = ["Parcel", "WorkerLost", "map_tasks"]

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 0.5
"""Seconds after which a signal is noticed at the latest."""

_GRACE = 20.0
"""Seconds to wait for the end of cancelled tasks."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A value in the object store of a cluster, which each node fetches once, and a key of its own."""

    key: str
    reference: Any

    @classmethod
    def put(cls, value: Any) -> Parcel:
        """Put a value into the store of the cluster that is connected."""
        return cls(uuid4().hex, import_ray().put(value))

    def fetch(self) -> Any:
        """Return the value."""
        return import_ray().get(self.reference)


class WorkerLost(MergingError):
    """The workers that had a task died, again and again."""

    def __init__(self, message: str, task: Any = None) -> None:
        super().__init__(message)
        self.task = task


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error that is raised on purpose, as a value: Ray would wrap it."""

    error: MergingError


@dataclass(slots=True)
class _Attempt(Generic[T]):
    """A task, and the number of its workers that died."""

    task: T
    deaths: int = 0


def map_tasks(
    function: Callable[[T], R],
    tasks: Iterable[T],
    cluster: RayCluster | None,
    *,
    split: Callable[[T], Sequence[T]] | None = None,
) -> Generator[tuple[T, R], None, None]:
    """Apply a function to tasks on a cluster, and yield each task with its result as they end.

    Ray chooses the nodes. No more tasks are handed out than twice the number of workers, and with
    ``cluster.workers`` no more than that number. A task whose worker or node dies is repeated. When the caller stops
    (an error, Ctrl-C, or the end of its loop), the tasks that run are cancelled.

    Args:
        function: the function. It and its tasks are pickled, so that functions of scripts and notebooks work too.
        tasks: the tasks, taken one after the other as there is room.
        cluster: the cluster; None applies the function here, in order.
        split: divides a task whose worker died into smaller ones, so that only the fatal part fails.

    Yields:
        A task and its result. The order is the order in which tasks end.

    Raises:
        WorkerLost: for a task whose workers died ``cluster.tries`` times.
        Exception: the first error of the function.
    """
    if cluster is None:
        for task in tasks:
            yield task, function(task)
        return
    with connect(cluster) as ray:
        remote = ray.remote(_apply).options(
            num_cpus=cluster.worker_cpus, num_gpus=cluster.worker_gpus, memory=cluster.memory, max_retries=0
        )
        kept, words = ray.put(function), words_of_reader()
        room = count_workers(ray, cluster) * (2 if cluster.workers is None else 1)
        again: deque[_Attempt[T]] = deque()
        coming = iter(tasks)
        running: dict[Any, _Attempt[T]] = {}
        try:
            while True:
                while len(running) < room:
                    attempt = again.popleft() if again else next(map(_Attempt, coming), None)
                    if attempt is None:
                        break
                    running[remote.remote(kept, attempt.task, words)] = attempt
                if not running:
                    return
                ended, _ = ray.wait([*running], timeout=_PATIENCE)
                for each in ended:
                    attempt = running[each]
                    try:
                        result = _get(ray, each)
                    except _deaths(ray) as error:
                        again.extend(_repeat(attempt, split, cluster.tries, error))
                        continue
                    finally:
                        del running[each]
                    if isinstance(result, _Failure):
                        raise result.error
                    yield attempt.task, result
        finally:
            _cancel(ray, [*running])


def _apply(function: Callable[[T], R], task: T, words: Any) -> R | _Failure:
    """Apply a function to a task, in a worker."""
    try:
        with words():
            return function(task)
    except MergingError as error:
        return _Failure(error)


def _get(ray: Any, reference: Any) -> Any:
    """Return the result of a task. Raises its error, also where its worker lacks a package."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        missing = re.search("No module named '([^']*)'", str(error))
        if missing is None:
            raise
        raise InputError(
            f"a worker of the cluster cannot import {missing[1]}: install it on every node, with the same version of "
            f"merging"
        ) from None


def _repeat(
    attempt: _Attempt[T], split: Callable[[T], Sequence[T]] | None, tries: int, error: Exception
) -> list[_Attempt[T]]:
    """Return the attempts after a death: of the parts of a task, or of the task itself."""
    parts = split(attempt.task) if split else [attempt.task]
    if len(parts) > 1:
        return [_Attempt(part) for part in parts]
    deaths = attempt.deaths + 1
    if deaths >= tries:
        raise WorkerLost(f"its worker died {deaths} times ({first_sentence(error)})", attempt.task)
    return [_Attempt(attempt.task, deaths)]


def _deaths(ray: Any) -> tuple[type[Exception], ...]:
    """Return the errors of Ray for workers and nodes that died, and for results that went with them."""
    named = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ObjectLostError", "LocalRayletDiedError")
    return tuple(getattr(ray.exceptions, name) for name in named if hasattr(ray.exceptions, name))


def _cancel(ray: Any, running: Sequence[Any]) -> None:
    """Stop tasks by ending their workers, and wait until they have stopped, through any further Ctrl-C."""
    for each in running:
        with suppress(Exception, KeyboardInterrupt):
            ray.cancel(each, force=True)
    with suppress(Exception, KeyboardInterrupt):
        if running:
            ray.wait([*running], num_returns=len(running), timeout=_GRACE)
