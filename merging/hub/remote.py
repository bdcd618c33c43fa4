"""A weights file on the Hub: its header read by range requests, its values when the merge comes to them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from merging.errors import OutputError
from merging.hub.client import Unreachable, patiently
from merging.hub.download import Told, download, hash_of, range_of
from merging.sources.header import header_length, parse_header
from merging.sources.opening import STAND_INS
from merging.sources.pickled import open_pickle
from merging.sources.stored import File, FileContents, FileTensor

__all__ = ["RemoteFile", "Window", "opened_remote"]

_FIRST = 1 << 16
"""Bytes of the first request: most headers fit, so that one request is enough."""


_FEW = 1 << 16
"""Bytes that are asked for alone rather than with their whole file."""


class RemoteFile:
    """One file of a repository at a commit, which stands at ``path`` in the mirror.

    It is downloaded, whole and checked by its hash, when its first value is read: into the library's cache, or with a
    ``window`` into a folder in which only the last few files stay.
    """

    def __init__(self, repo: str, commit: str, name: str, size: int, sha256: str | None, path: Path) -> None:
        self.repo, self.commit, self.name, self.size, self.sha256, self.path = repo, commit, name, size, sha256, path
        self.window: Window | None = None
        self._lock = threading.Lock()
        self._here: Path | None = None
        self._file: File | None = None

    @property
    def at_hand(self) -> bool:
        """Whether its values can be read now: it has come, or comes in a window."""
        return self._here is not None or self.window is not None

    @property
    def label(self) -> str:
        return f"{self.repo}@{self.commit[:12]}/{self.name}"

    @property
    def url(self) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self.repo, self.name, revision=self.commit))

    def cached(self) -> Path | None:
        """Where the file lies in the library's cache, if it does."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, self.name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def identity(self) -> str:
        """What tells its content from any other's, where it has not come yet."""
        return self.sha256 or f"{self.repo}/{self.commit}/{self.name}"

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes from ``offset`` on, after the file has come."""
        if self.window is not None:
            if len(into) > _FEW or self.window.holds(self):
                self.window.file(self).read(into, offset)
            else:  # not worth a whole file
                into[:] = range_of(self.url, offset, offset + len(into), self.label)
            return
        with self._lock:
            if self._file is None:
                self._file = File(self.fetch())
        self._file.read(into, offset)

    def advise(self, offset: int, nbytes: int) -> None:
        """Have the system read ahead what has come."""
        if self._file is not None:
            self._file.advise(offset, nbytes)

    def fetch(self, told: Told | None = None) -> Path:
        """Download the file into the library's cache, unless it is there, and return its path."""
        self._here = self.cached() or self._downloaded(told)
        if self.path in STAND_INS:  # who reads the mirror from now on finds the file itself
            link = self.path.with_name(f"{self.path.name}.{threading.get_ident()}")
            link.symlink_to(self._here.resolve())
            link.replace(self.path)
            STAND_INS.pop(self.path, None)
        return self._here

    def _downloaded(self, told: Told | None) -> Path:
        from filelock import FileLock
        from huggingface_hub import constants, hf_hub_download

        by_library = self._in_chunks() or self.sha256 is None
        if not by_library:
            folder = f"models--{self.repo.replace('/', '--')}"
            blob = Path(constants.HF_HUB_CACHE) / folder / "blobs" / str(self.sha256)
            lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder / f"{self.sha256}.lock"  # the library's own
            try:
                blob.parent.mkdir(parents=True, exist_ok=True)
                lock.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{blob.parent}: cannot be written: {error.strerror}: set HF_HOME") from None
            with FileLock(lock):
                download(self.url, blob, self.size, self.sha256, self.label, told)
        path = Path(patiently(lambda: hf_hub_download(self.repo, self.name, revision=self.commit), self.label))
        if by_library:
            if self.sha256 is not None and hash_of(path) != self.sha256:
                path.resolve().unlink()
                raise Unreachable(f"{self.label}: what came has another hash than the Hub states: try again")
            if told is not None:
                told(self.size)
        return path

    def _in_chunks(self) -> bool:
        """Whether the Hub has the file in chunks, which the library fetches faster than any single stream."""
        from importlib.util import find_spec

        from huggingface_hub import constants, get_hf_file_metadata

        if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
            return False
        return patiently(lambda: get_hf_file_metadata(self.url), self.label).xet_file_data is not None


class Window:
    """The files of one model that are on this disk at a time: the one that is read, and the one before it.

    Neighbouring pieces of work may lie on both sides of the border between two files.
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
        """The file of a remote one, downloaded again if it was dropped."""
        found = self._held(remote)
        if found is None:
            with self._fetching:  # one at a time, while others go on reading what is there
                found = self._held(remote) or self._fetched(remote)
        return found

    def _held(self, remote: RemoteFile) -> File | None:
        with self._lock:
            if remote.name in self._open:
                self._open.move_to_end(remote.name)
            return self._open.get(remote.name)

    def _fetched(self, remote: RemoteFile) -> File:
        with self._lock:
            while len(self._open) >= self.count:
                self._open.popitem(last=False)  # closed, and so gone from the disk, when its last reader is done
        place = self.folder / hashlib.sha256(remote.label.encode()).hexdigest()[:16]
        download(remote.url, place, remote.size, remote.sha256, remote.label)
        file = File(place)
        with suppress(OSError):  # where open files cannot be removed they stay until the end
            place.unlink()
        with self._lock:
            self._open[remote.name] = file
        return file


def opened_remote(remote: RemoteFile) -> FileContents:
    """The tensors of a remote file: of a safetensors file from its header alone, any other is downloaded for it."""
    if not remote.name.endswith(".safetensors"):
        return open_pickle(remote.fetch())
    head = range_of(remote.url, 0, min(_FIRST, remote.size), remote.label) if remote.size else b""
    length = header_length(head[:64], remote.size, remote.label)
    raw = head[8 : 8 + length]
    if len(raw) < length:
        raw += range_of(remote.url, 8 + len(raw), 8 + length, remote.label)
    header = parse_header(raw, remote.size, remote.label)
    return {name: FileTensor(remote, entry) for name, entry in header.entries.items()}, header.metadata
