"""Places where models for a store appear: a folder, or a query of the Hub."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from merging.continual.manifest import Manifest
from merging.display.progress import Progress
from merging.errors import InputError, MergingError, escape_unprintable
from merging.hub.query import Query, parse_query
from merging.sources.pickled import PYTORCH_ENDINGS

__all__ = ["Arrival", "Inbox", "Pause", "WatchEnded", "open_inbox", "run_interruptibly"]

T = TypeVar("T")

_WEIGHTS = (".safetensors", *PYTORCH_ENDINGS)

_SLICE = 0.1
"""Most seconds until a request to end is noticed."""

Pause = Callable[[float], bool]
"""Waits a number of seconds, and returns whether to end."""


class WatchEnded(MergingError):
    """The watch was asked to end during a download; the files that have come stay for the next time."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A model that has appeared.

    Attributes:
        model: the argument of ``add``.
        source: the name under which a refusal is noted.
        mark: a fingerprint, which differs when the content has changed.
        remote: whether it has yet to be fetched.
    """

    model: Path | str
    source: str
    mark: str
    remote: bool = False


class Inbox(Protocol):
    """A place where models appear; it takes ``looks`` looks to see that the models there are complete."""

    looks: int

    def arrivals(self, manifest: Manifest, pause: Pause) -> Iterator[Arrival]:
        """Return the models that are complete, the oldest first."""


def open_inbox(source: str | Path) -> Inbox:
    """Return the inbox of a query of the Hub (``hub:...``) or of a folder."""
    query = parse_query(str(source))
    return _FolderInbox(Path(source)) if query is None else _HubInbox(query)


def run_interruptibly(work: Callable[[Progress], T], pause: Pause) -> T:
    """Return what ``work`` returns; raise :class:`WatchEnded` at once when ``pause`` says so.

    ``work`` runs in a thread, which ends at the next byte that it gets from the Hub.
    """
    returned: list[T] = []
    raised: list[BaseException] = []
    stop = threading.Event()

    def check_stop(done: int, total: int) -> None:
        if stop.is_set():
            raise WatchEnded("given up")

    def run() -> None:
        try:
            returned.append(work(check_stop))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            if pause(0):
                raise WatchEnded("given up")
            thread.join(_SLICE)
    finally:
        stop.set()
    if raised:
        raise raised[0]
    return returned[0]


class _HubInbox:
    """The models that a query finds, each at its present commit."""

    looks = 1

    def __init__(self, query: Query) -> None:
        self.query = query
        if "HF_HUB_VERBOSITY" not in os.environ:  # the watch reports once what the library reports at each try
            from huggingface_hub.utils import logging

            logging.set_verbosity_error()

    def arrivals(self, manifest: Manifest, pause: Pause) -> Iterator[Arrival]:
        found = run_interruptibly(lambda _: self.query.models(), pause)
        there = {step.source for step in manifest.steps}
        for each in found:
            if str(each.address) not in there:
                yield Arrival(str(each.address), each.repo, each.commit, remote=True)


class _FolderInbox:
    """The weights files, and the folders with weights files, directly in a folder.

    A model is complete when nothing in it has changed since the look before.
    """

    looks = 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before: dict[Path, str] = {}

    def arrivals(self, manifest: Manifest, pause: Pause) -> Iterator[Arrival]:
        before, self._before = self._before, {path: _fingerprint(path) for path in _models(self.folder)}
        for path, mark in self._before.items():
            if mark == before.get(path) and mark == _fingerprint(path):
                yield Arrival(path, escape_unprintable(str(path.resolve())), mark)


def _models(folder: Path) -> list[Path]:
    """Return the files and folders that may be models, the oldest first, without hidden names."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        raise InputError(f"{folder}: there is no such folder to watch (a query of the Hub begins with hub:)") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be watched: {error.strerror}") from None
    models = [path for path in found if path.suffix in _WEIGHTS or any(_weights(path))]
    return sorted(models, key=lambda path: (_newest(path), path.name))


def _weights(folder: Path) -> list[Path]:
    """Return the weights files directly in a folder; none if it is a file, or has just gone."""
    try:
        return [path for path in folder.iterdir() if path.suffix in _WEIGHTS]
    except OSError:
        return []


def _files(path: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        with suppress(OSError):  # it may go at any time
            status = each.stat()
            if stat.S_ISREG(status.st_mode):
                found.append((each, status))
    return found


def _newest(path: Path) -> int:
    return max((status.st_mtime_ns for _, status in _files(path)), default=0)


def _fingerprint(path: Path) -> str:
    """Return a hash of the names, sizes and times of a model's files, which changes when a file is written."""
    digest = hashlib.sha256()
    for file, status in _files(path):
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
