"""The folder of a store: made whole, written to by one process at a time, never holding half a state by its name."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from merging import platform
from merging.continual.manifest import Manifest, write_manifest
from merging.errors import OutputError
from merging.landing import umask

__all__ = ["STATES", "Busy", "found", "locked", "remove", "unfinished"]

STATES = "states"

_LOCK, _UNFINISHED, _NEW = ".lock", ".unfinished.", ".new"


class Busy(OutputError):
    """Another process is writing to the store."""


@contextmanager
def locked(store: Path, wait: float) -> Iterator[None]:
    """Hold the store's lock, for which others are waited so many seconds (without end if negative).

    The lock goes with its process, so none is ever stale. Raises :class:`Busy` if it was not to be had.
    """
    try:
        lock = FileLock(store / _LOCK, timeout=wait)
        lock.acquire()
    except Timeout:
        raise Busy(f"{store}: another process is writing to this store: try again later") from None
    except OSError as error:
        raise OutputError(f"{store}: cannot be written to: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def unfinished(store: Path) -> Path:
    """A new folder for a state that is being written."""
    try:
        return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=store / STATES))
    except OSError as error:
        raise OutputError(f"{store}: cannot be written to: {error.strerror}") from None


def found(path: Path, manifest: Manifest) -> None:
    """Make an empty store, whole or not at all; what killed ones left beside it is removed."""
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{_NEW}"):
            shutil.rmtree(left, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(_NEW, f".{path.name}.", path.parent))
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        (new / STATES).mkdir()
        write_manifest(new, manifest)
        new.chmod(0o777 & ~umask())
        new.rename(path)  # onto nothing, or an empty folder
        platform.sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def remove(folder: Path) -> None:
    """Take a state away; killed on the way, it leaves nothing that looks like a state."""
    going = folder.with_name(f"{_UNFINISHED}{folder.name}")
    with suppress(OSError):
        folder = folder.rename(going)
    shutil.rmtree(folder, ignore_errors=True)
