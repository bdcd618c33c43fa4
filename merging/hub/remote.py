"""A weights file elsewhere: its header is read by range requests, its values when the merge needs them."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from merging.display.progress import Progress
from merging.sources.header import header_length, parse_header
from merging.sources.links import link_or_copy
from merging.sources.open_files import File
from merging.sources.opening import open_tensors
from merging.sources.stored import FileContents, FileTensor

__all__ = ["RemoteFile", "Window"]

_FIRST = 1 << 16
"""Bytes of the first request: most headers fit, so that one request is enough."""

_FEW = 1 << 16
"""Up to this many bytes are requested alone, without the rest of their file."""


class RemoteFile(ABC):
    """A file on the Hub or in an object store, which has an empty placeholder at ``path`` in its model's mirror.

    The file is downloaded whole when its first value is read: into a cache, or with a ``window`` into a folder that
    keeps only the last few files. The placeholder then becomes a link to it.

    Attributes:
        repo: The address of its model.
        name: Its path in the model's folder.
        size: Its bytes.
        path: Its placeholder.
        sha256: The hash of its bytes, None if it is not stated.
    """

    def __init__(self, repo: str, name: str, size: int, path: Path, sha256: str | None = None) -> None:
        self.repo = repo
        self.name = name
        self.size = size
        self.path = path
        self.sha256 = sha256
        self.window: Window | None = None
        self._lock = threading.Lock()
        self._here: Path | None = None
        self._file: File | None = None

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name in messages."""

    @abstractmethod
    def identity(self) -> str:
        """Return a text that only this content has, even before it is downloaded."""

    @abstractmethod
    def cached_path(self) -> Path | None:
        """Return the path of the file in the cache, None if it is not there."""

    @abstractmethod
    def fetch_range(self, start: int, stop: int) -> bytes:
        """Fetch the bytes ``start`` to ``stop`` alone. Raises :class:`~merging.errors.InputError`."""

    @abstractmethod
    def download_to(self, place: Path) -> None:
        """Download the file to ``place``, which then exists whole, or not at all."""

    @abstractmethod
    def download_to_cache(self, progress: Progress | None) -> Path:
        """Download the file into the cache, and return its path there."""

    @property
    def at_hand(self) -> bool:
        """Whether its values can be read now: it is downloaded, or will be into a window."""
        return self._here is not None or self.window is not None

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes from ``offset`` on; the file is downloaded first."""
        if self.window is not None:
            if len(into) > _FEW or self.window.holds(self):
                self.window.file(self).read(into, offset)
            else:  # not worth a whole file
                into[:] = self.fetch_range(offset, offset + len(into))
            return
        with self._lock:
            if self._file is None:
                self._file = File(self.fetch())
        self._file.read(into, offset)

    def advise(self, offset: int, nbytes: int) -> None:
        """Have the system read ahead if the file is here."""
        if self._file is not None:
            self._file.advise(offset, nbytes)

    @cached_property
    def contents(self) -> FileContents:
        """The tensors and metadata: of safetensors from the header alone, any other file is downloaded for them.

        They are read once, since this content never changes.
        """
        if not self.name.endswith(".safetensors"):
            return open_tensors(self.fetch())
        head = self.fetch_range(0, min(_FIRST, self.size)) if self.size else b""
        length = header_length(head[:64], self.size, self.label)
        raw = head[8 : 8 + length]
        if len(raw) < length:
            raw += self.fetch_range(8 + len(raw), 8 + length)
        header = parse_header(raw, self.size, self.label)
        return {name: FileTensor(self, entry) for name, entry in header.entries.items()}, header.metadata

    def fetch(self, progress: Progress | None = None) -> Path:
        """Download the file into the cache, unless it is there, and return its path."""
        self._here = self.cached_path() or self.download_to_cache(progress)
        if self.path.exists() and not self.path.is_symlink():  # readers of the mirror find the file itself from now on
            link = self.path.with_name(f"{self.path.name}.{threading.get_ident()}")
            link_or_copy(link, self._here)
            link.replace(self.path)
        return self._here


class Window:
    """The files of one model that are on this disk at a time: the current file and the file before it.

    Both are needed, since neighbouring pieces of work may be in two files.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder = folder
        self.count = count
        self._lock = threading.Lock()
        self._fetching = threading.Lock()
        self._open: OrderedDict[str, File] = OrderedDict()

    def holds(self, remote: RemoteFile) -> bool:
        """Whether the file is on this disk now."""
        with self._lock:
            return remote.name in self._open

    def file(self, remote: RemoteFile) -> File:
        """Return the open file of a remote file, downloaded again if it was dropped."""
        found = self._find_open(remote)
        if found is None:
            with self._fetching:  # one at a time, while other threads read what is here
                found = self._find_open(remote) or self._fetch(remote)
        return found

    def _find_open(self, remote: RemoteFile) -> File | None:
        with self._lock:
            if remote.name in self._open:
                self._open.move_to_end(remote.name)
            return self._open.get(remote.name)

    def _fetch(self, remote: RemoteFile) -> File:
        with self._lock:
            while len(self._open) >= self.count:
                self._open.popitem(last=False)  # closed, and so gone from the disk, when its last reader is done
        place = self.folder / hashlib.sha256(remote.label.encode()).hexdigest()[:16]
        remote.download_to(place)
        file = File(place)
        with suppress(OSError):  # where open files cannot be removed they stay until the end
            place.unlink()
        with self._lock:
            self._open[remote.name] = file
        return file
