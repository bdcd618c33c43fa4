"""Where models appear that a store is to take: a folder, or what a query finds on the Hub."""

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
from merging.engine.threads import Progress
from merging.errors import InputError, MergingError, escape_unprintable
from merging.hub.query import Query, parse_query

__all__ = ["Arrival", "Ended", "Incoming", "Pause", "attended", "incoming"]

T = TypeVar("T")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")

_SLICE = 0.1
"""Seconds after which the wish to end is noticed at the latest."""

Pause = Callable[[float], bool]
"""Waits so many seconds, and tells whether to end."""


class Ended(MergingError):
    """The wait for the Hub was given up, as it was wished; what has come stays for another time."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A model that has appeared: what ``add`` takes, what its refusal is noted under, and the ``mark`` of its content,
    which is another one when it has changed. ``remote``: it has yet to be fetched."""

    model: Path | str
    source: str
    mark: str
    remote: bool = False


class Incoming(Protocol):
    """Where models appear; ``looks`` are needed until all that is there was seen to be complete."""

    looks: int

    def arrivals(self, manifest: Manifest, pause: Pause) -> Iterator[Arrival]:
        """What is complete, the oldest first."""


def incoming(source: str | Path) -> Incoming:
    """The query of the Hub, or the folder, that is meant."""
    query = parse_query(str(source))
    return _Folder(Path(source)) if query is None else _Hub(query)


def attended(work: Callable[[Progress], T], pause: Pause) -> T:
    """What ``work`` returns or raises; :class:`Ended` at once when ``pause`` tells to end.

    It is done in a thread, which may then have to wait for the Hub a little longer, and ends at its next byte.
    """
    returned: list[T] = []
    raised: list[BaseException] = []
    stop = threading.Event()

    def told(done: int, total: int) -> None:
        if stop.is_set():
            raise Ended("given up")

    def run() -> None:
        try:
            returned.append(work(told))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            if pause(0):
                raise Ended("given up")
            thread.join(_SLICE)
    finally:
        stop.set()
    if raised:
        raise raised[0]
    return returned[0]


class _Hub:
    """What a query finds, each model as the commit that it is now."""

    looks = 1

    def __init__(self, query: Query) -> None:
        self.query = query
        if "HF_HUB_VERBOSITY" not in os.environ:  # what the library says of every try, the watch says once
            from huggingface_hub.utils import logging

            logging.set_verbosity_error()

    def arrivals(self, manifest: Manifest, pause: Pause) -> Iterator[Arrival]:
        found = attended(lambda _: self.query.models(), pause)
        there = {step.source for step in manifest.steps}
        for each in found:
            if str(each.address) not in there:
                yield Arrival(str(each.address), each.repo, each.commit, remote=True)


class _Folder:
    """The weights files, and the folders with such files, directly in a folder.

    One is complete when nothing in it has changed since the look before.
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
    """What may be a model, the oldest first; hidden names are not looked at."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        raise InputError(f"{folder}: there is no such folder to watch (a query of the Hub begins with hub:)") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be watched: {error.strerror}") from None
    models = [path for path in found if path.suffix in _WEIGHTS or any(_weights(path))]
    return sorted(models, key=lambda path: (_newest(path), path.name))


def _weights(folder: Path) -> list[Path]:
    """Weights files directly in a folder; none of what is no folder, or has just gone."""
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
    """Names, sizes and times of all files of a model: the same as long as nothing is written."""
    digest = hashlib.sha256()
    for file, status in _files(path):
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
