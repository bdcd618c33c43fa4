"""A weights file in an object store, pinned to its ETag."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from merging.display.progress import Progress
from merging.errors import FormatError, OutputError
from merging.hub.download import append_missing
from merging.hub.remote import RemoteFile
from merging.object_stores.objects import StoredObject

__all__ = ["ObjectFile", "cache_folder"]

_CHUNK = 1 << 23
"""Bytes of one request of a download."""

_REQUESTS = 3
"""Requests at a time for one file: a store sends each slower than the network."""


def cache_folder() -> Path:
    """Return the folder with the weights of object stores that were downloaded."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "merging", "objects")


class ObjectFile(RemoteFile):
    """A file of a folder in a store. Downloads go into a cache, under a key of the address and ETag."""

    def __init__(self, repo: str, name: str, path: Path, stored: StoredObject) -> None:
        super().__init__(repo, name, stored.size, path)
        self.stored = stored

    @property
    def label(self) -> str:
        return self.stored.address

    def identity(self) -> str:
        return f"{self.stored.address} {self.stored.version} {self.size}"

    def cached_path(self) -> Path | None:
        path = self._cache_path()
        return path if path.exists() else None

    def fetch_range(self, start: int, stop: int) -> bytes:
        return self.stored.read(start, stop)

    def download_to(self, place: Path) -> None:
        self._download(place, None)

    def download_to_cache(self, progress: Progress | None) -> Path:
        from filelock import FileLock

        path = self._cache_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path.parent}: cannot be written: {error.strerror}: set XDG_CACHE_HOME") from None
        with FileLock(path.with_name(".lock")):
            self._download(path, progress)
        return path

    def _cache_path(self) -> Path:
        key = hashlib.sha256(self.identity().encode()).hexdigest()[:32]
        return cache_folder() / key / Path(self.name).name

    def _download(self, place: Path, progress: Progress | None) -> None:
        """Download to ``place``; a download that stopped there goes on."""
        if place.exists():
            return
        part = place.with_name(place.name + ".part")

        def fetch(stream: BinaryIO, done: int) -> None:
            starts = range(done, self.size, _CHUNK)
            with ThreadPoolExecutor(_REQUESTS) as pool:
                waiting = [pool.submit(self._read_chunk, start) for start in starts[:_REQUESTS]]
                for number in range(len(starts)):
                    chunk = waiting.pop(0).result()
                    stream.write(chunk)
                    done += len(chunk)
                    if number + _REQUESTS < len(starts):
                        waiting.append(pool.submit(self._read_chunk, starts[number + _REQUESTS]))
                    if progress is not None:
                        progress(done, self.size)

        append_missing(part, self.size, self.label, fetch)
        try:
            self.stored.check()
        except FormatError:
            part.unlink()
            raise
        part.replace(place)

    def _read_chunk(self, start: int) -> bytes:
        return self.stored.read_unchecked(start, min(start + _CHUNK, self.size))
