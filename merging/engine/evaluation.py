"""Evaluations of many things by one function that takes long to make: here one by one, or in parallel on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from merging.cluster import Parcel, RayCluster, WorkerLost, connect, make_cluster, map_tasks
from merging.engine.cluster_crew import give_gpus, pick_cluster_devices
from merging.engine.remote_work import check_versions, in_folder, versions
from merging.engine.transport import pack, unpack
from merging.errors import InputError
from merging.hub.address import hub_address, local_path
from merging.maths.lazy_torch import torch
from merging.sources.open_files import File

__all__ = ["evaluate_each", "make_evaluation_cluster"]


class _Named(Protocol):
    """A thing that is evaluated, with a name for messages."""

    @property
    def name(self) -> str:
        """The name."""


K = TypeVar("K", bound=_Named)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """An evaluation as its workers receive it.

    Attributes:
        prepare: the bytes of the function that makes the evaluating function.
        threads: the threads of a worker.
        folder: the working folder of the program, since paths may be relative.
        versions: the versions that decide results, by name, as the program has them.
    """

    prepare: Parcel
    threads: int
    folder: Path
    versions: Mapping[str, str]


_prepared: tuple[str, Callable[[Any], Any]] | None = None
"""The key of the last evaluation of this process, and its function: making one may load a whole model."""


def make_evaluation_cluster(
    engine: str | RayCluster, address: str | None = None, device: str | torch.device = "cpu"
) -> RayCluster | None:
    """Return the cluster of an engine's options, with a GPU for each worker that needs one; None for ``local``.

    Raises :class:`~merging.errors.OptionError` for an engine, an address or a device that cannot be used.
    """
    cluster = make_cluster(engine, address)
    return None if cluster is None else give_gpus(cluster, pick_cluster_devices(device)[0])


def evaluate_each(
    tasks: Iterable[tuple[K, T]],
    prepare: Callable[[], Callable[[T], R]],
    cluster: RayCluster | None,
    *,
    models: Iterable[str] = (),
) -> Generator[tuple[K, R], None, None]:
    """Evaluate tasks by one function, and yield each key with its result, in the order of the tasks.

    Args:
        tasks: keys, which stay here, with tasks, which go to workers. Open files go by their paths.
        prepare: makes the function: once here, or once in each worker of a cluster. It has to be possible to pickle.
        cluster: the cluster; None evaluates here.
        models: the names or paths of models that workers open themselves. They check that they see the files.

    Yields:
        A key and the result of its task.

    Raises:
        InputError: for a task whose workers died again and again, and for workers that do not see the files.
        MergingError: the first error of the function.
    """
    if cluster is None:
        function = prepare()
        for key, task in tasks:
            yield key, function(task)
        return
    keys: dict[int, K] = {}  # of the tasks that are not yielded
    done: dict[int, R] = {}

    def number_tasks() -> Iterator[tuple[int, bytes]]:
        for number, (key, task) in enumerate(tasks):
            keys[number] = key
            yield number, pack(task)

    with connect(cluster):
        evaluation = _Evaluation(
            prepare=Parcel.put(pack((prepare, [_files_of(each) for each in models]))),
            threads=cluster.threads,
            folder=Path.cwd(),
            versions=versions(),
        )
        try:
            with closing(map_tasks(partial(_evaluate, evaluation), number_tasks(), cluster)) as results:
                for (number, _), result in results:
                    done[number] = result
                    while (first := next(iter(keys), None)) in done:
                        assert first is not None
                        yield keys.pop(first), done.pop(first)
        except WorkerLost as lost:
            name = keys[lost.task[0]].name
            raise InputError(f"{name}: {lost}: leave it out, or give the workers more memory") from None


def _evaluate(evaluation: _Evaluation, task: tuple[int, bytes]) -> Any:
    """Evaluate a task in a worker."""
    global _prepared
    check_versions(evaluation.versions)
    with in_folder(evaluation.folder), _threads(evaluation.threads):
        if _prepared is None or _prepared[0] != evaluation.prepare.key:
            _prepared = None  # its memory is freed first
            prepare, _ = unpack(evaluation.prepare.fetch())
            _prepared = evaluation.prepare.key, prepare()
        return _prepared[1](unpack(task[1]))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _files_of(model: str) -> list[File]:
    """Return the open files of a model on this disk; none for one of the Hub."""
    if hub_address(model) is not None:
        return []
    path = local_path(model)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [File(each) for each in files if each.is_file() and not each.name.startswith(".")]
