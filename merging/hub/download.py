"""Downloads: resumed after a kill, tried again after a failure; from the Hub, checked by their hash."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from merging import os_calls
from merging.display.progress import Progress
from merging.errors import InputError, OutputError
from merging.hub.client import Unreachable, with_retries

__all__ = ["append_missing", "download", "fetch_range", "file_hash"]

_log = logging.getLogger(__name__)

_BLOCK = 1 << 22


def download(
    url: str, target: Path, size: int, sha256: str | None, name: str, progress: Progress | None = None
) -> None:
    """Download ``url`` to ``target``, which afterwards exists whole and with this hash, or not at all.

    Until it is complete the file is called ``TARGET.part``. The next call continues it, in whatever process. A lock
    must keep two calls at once apart.

    Args:
        url: The address of the file.
        target: The path of the downloaded file.
        size: The size of the file in bytes.
        sha256: The hash that the Hub states, None where it states none.
        name: The name of the file in messages.
        progress: Called with the bytes of the file that are here, and ``size``.

    Raises:
        InputError: The Hub keeps failing, or the hash is wrong.
        OutputError: The disk is full.
    """
    _log.info("downloading %r, %d bytes", name, size)
    part = target.with_name(target.name + ".part")
    for _ in range(2):
        if target.exists():
            return
        with_retries(lambda: _fetch_rest(url, part, size, name, progress), name)
        if sha256 is None or file_hash(part) == sha256:
            part.replace(target)
            return
        part.unlink()
    raise Unreachable(f"{name}: what arrives has another hash than the Hub states: it is damaged on its way")


def _fetch_rest(url: str, part: Path, size: int, name: str, progress: Progress | None) -> None:
    """Append the missing bytes to ``part``."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    def fetch(stream: BinaryIO, done: int) -> None:
        bar = _progress_bar(progress, done, size)
        http_get(url, stream, resume_size=done, headers=build_hf_headers(), expected_size=size, tqdm_class=bar)

    append_missing(part, size, name, fetch)


def append_missing(part: Path, size: int, name: str, fetch: Callable[[BinaryIO, int], None]) -> None:
    """Append the missing bytes to a file, and make it durable.

    Args:
        part: The file, which is created if it does not exist.
        size: The bytes of the whole.
        name: The name of the file in messages.
        fetch: Writes the bytes from a position on to the stream.

    Raises:
        OutputError: The disk is full, or refuses the file.
    """
    with open(part, "ab", opener=os_calls.without_links) as stream:
        done = stream.tell()
        if done > size:
            stream.truncate(0)
            done = 0
        try:
            # the space is reserved at once, so that a full disk is noticed before the first byte
            _reserve(stream.fileno(), size)
            if done < size:
                fetch(stream, done)
            stream.flush()
            os_calls.sync(stream.fileno())
        except OSError as error:
            if error.errno is not None and getattr(error, "response", None) is None and not _is_network_error(error):
                raise OutputError(f"{name}: cannot be stored in {part.parent}: {error.strerror}") from None
            raise


def _reserve(fd: int, size: int) -> None:
    free = os.fstatvfs(fd)
    lacking = size - os.fstat(fd).st_size
    if free.f_blocks and free.f_bavail * free.f_frsize < lacking:
        raise OSError(28, f"{lacking / 1e6:.1f} MB are needed, and {free.f_bavail * free.f_frsize / 1e6:.1f} MB free")


def _is_network_error(error: OSError) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError))


def _progress_bar(progress: Progress | None, done: int, total: int) -> Any:
    """Return a class that the library takes for a progress bar, and that only calls ``progress``."""
    from tqdm import tqdm

    class Counter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.done = done

        def update(self, n: float | None = 1) -> None:
            if progress is not None and n:
                self.done += int(n)
                progress(self.done, total)

    return Counter


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with os.fdopen(os_calls.open_regular(path), "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch_range(url: str, start: int, stop: int, name: str) -> bytes:
    """Fetch the bytes ``start`` to ``stop`` of a file alone.

    Raises :class:`~merging.errors.InputError` if the server sends something else.
    """
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def ask() -> bytes:
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            if response.status_code != 206:
                raise InputError(f"{name}: the server sends only whole files, so it must be downloaded first")
            found = b"".join(response.iter_bytes())
        if len(found) != stop - start:
            raise ConnectionError(f"{len(found)} of {stop - start} bytes came")
        return found

    return with_retries(ask, name)
