"""A weights file on the Hub: its header is read by range requests, its values when the merge needs them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from merging.display.progress import Progress
from merging.errors import OutputError
from merging.hub.client import Unreachable, with_retries
from merging.hub.download import download, fetch_range, file_hash
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


class RemoteFile:
    """One file of a repository at a commit, which has an empty placeholder at ``path`` in the mirror.

    The file is downloaded, whole and checked by its hash, when its first value is read: into the library's cache, or
    with a ``window`` into a folder that keeps only the last few files. The placeholder then becomes a link to it.
    """

    def __init__(self, repo: str, commit: str, name: str, size: int, sha256: str | None, path: Path) -> None:
        self.repo = repo
        self.commit = commit
        self.name = name
        self.size = size
        self.sha256 = sha256
        self.path = path
        self.window: Window | None = None
        self._lock = threading.Lock()
        self._here: Path | None = None
        self._file: File | None = None

    @property
    def at_hand(self) -> bool:
        """Whether its values can be read now: it is downloaded, or will be into a window."""
        return self._here is not None or self.window is not None

    @property
    def label(self) -> str:
        return f"{self.repo}@{self.commit[:12]}/{self.name}"

    @property
    def url(self) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self.repo, self.name, revision=self.commit))

    def cached_path(self) -> Path | None:
        """Return the path of the file in the library's cache, None if it is not there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, self.name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def identity(self) -> str:
        """Return a text that only this content has, even before it is downloaded."""
        return self.sha256 or f"{self.repo}/{self.commit}/{self.name}"

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes from ``offset`` on; the file is downloaded first."""
        if self.window is not None:
            if len(into) > _FEW or self.window.holds(self):
                self.window.file(self).read(into, offset)
            else:  # not worth a whole file
                into[:] = fetch_range(self.url, offset, offset + len(into), self.label)
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

        A commit never changes, so that they are read once.
        """
        if not self.name.endswith(".safetensors"):
            return open_tensors(self.fetch())
        head = fetch_range(self.url, 0, min(_FIRST, self.size), self.label) if self.size else b""
        length = header_length(head[:64], self.size, self.label)
        raw = head[8 : 8 + length]
        if len(raw) < length:
            raw += fetch_range(self.url, 8 + len(raw), 8 + length, self.label)
        header = parse_header(raw, self.size, self.label)
        return {name: FileTensor(self, entry) for name, entry in header.entries.items()}, header.metadata

    def fetch(self, progress: Progress | None = None) -> Path:
        """Download the file into the library's cache, unless it is there, and return its path."""
        self._here = self.cached_path() or self._download(progress)
        if self.path.exists() and not self.path.is_symlink():  # readers of the mirror find the file itself from now on
            link = self.path.with_name(f"{self.path.name}.{threading.get_ident()}")
            link_or_copy(link, self._here)
            link.replace(self.path)
        return self._here

    def _download(self, progress: Progress | None) -> Path:
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
                download(self.url, blob, self.size, self.sha256, self.label, progress=progress)
        path = Path(with_retries(lambda: hf_hub_download(self.repo, self.name, revision=self.commit), self.label))
        if by_library:
            if self.sha256 is not None and file_hash(path) != self.sha256:
                path.resolve().unlink()
                raise Unreachable(f"{self.label}: what came has another hash than the Hub states: try again")
            if progress is not None:
                progress(self.size, self.size)
        return path

    def _in_chunks(self) -> bool:
        """Whether the Hub has the file in chunks, which the library fetches faster than any single stream."""
        from importlib.util import find_spec

        from huggingface_hub import constants, get_hf_file_metadata

        if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
            return False
        return with_retries(lambda: get_hf_file_metadata(self.url), self.label).xet_file_data is not None


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
        download(remote.url, place, remote.size, remote.sha256, remote.label)
        file = File(place)
        with suppress(OSError):  # where open files cannot be removed they stay until the end
            place.unlink()
        with self._lock:
            self._open[remote.name] = file
        return file
