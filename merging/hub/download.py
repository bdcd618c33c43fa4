"""Bringing a file of the Hub to the disk: resumed after a kill, tried again after a failure, checked by its hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.errors import InputError, OutputError
from merging.hub.client import Unreachable, patiently

__all__ = ["Told", "download", "hash_of", "range_of"]

Told = Callable[[int], None]
"""Told how many bytes have arrived since the last time."""

_BLOCK = 1 << 22


def download(url: str, target: Path, size: int, sha256: str | None, name: str, told: Told | None = None) -> None:
    """Bring ``url`` to ``target``, which is there whole and of that hash, or not at all.

    What arrives lies in ``TARGET.part`` until then, where the next call goes on, in whatever process; two at once must
    be kept apart by a lock. Raises :class:`~merging.errors.InputError` when the Hub keeps failing or the hash is wrong,
    :class:`~merging.errors.OutputError` when the disk is full.
    """
    part = target.with_name(target.name + ".part")
    for _ in range(2):
        if target.exists():
            return
        patiently(lambda: _append(url, part, size, name, told), name)
        if sha256 is None or hash_of(part) == sha256:
            part.replace(target)
            return
        part.unlink()
    raise Unreachable(f"{name}: what arrives has another hash than the Hub states: it is damaged on its way")


def _append(url: str, part: Path, size: int, name: str, told: Told | None) -> None:
    """Fetch what ``part`` lacks."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with open(part, "ab", opener=os_calls.without_links) as stream:
        there = stream.tell()
        if there > size:
            stream.truncate(0)
            there = 0
        try:
            # the room is taken at once, so that a full disk shows before the first byte
            _reserve(stream.fileno(), size)
            if there < size:
                counted = _bar(told)
                http_get(
                    url, stream, resume_size=there, headers=build_hf_headers(), expected_size=size, tqdm_class=counted
                )
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as error:
            if error.errno is not None and getattr(error, "response", None) is None and not _network(error):
                raise OutputError(f"{name}: cannot be stored in {part.parent}: {error.strerror}") from None
            raise


def _reserve(fd: int, size: int) -> None:
    free = os.fstatvfs(fd)
    lacking = size - os.fstat(fd).st_size
    if free.f_bavail * free.f_frsize < lacking:
        raise OSError(28, f"{lacking / 1e6:.1f} MB are needed, and {free.f_bavail * free.f_frsize / 1e6:.1f} MB free")


def _network(error: OSError) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError))


def _bar(told: Told | None) -> Any:
    """What the library takes for a progress bar, telling ``told`` alone."""
    from tqdm import tqdm

    class Counted(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if told is not None and n:
                told(int(n))

    return Counted


def hash_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with os.fdopen(os_calls.open_regular(path), "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def range_of(url: str, start: int, stop: int, name: str) -> bytes:
    """Bytes ``start`` to ``stop`` of a file, fetched alone.

    Raises :class:`~merging.errors.InputError` where a server sends something else.
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

    return patiently(ask, name)
