"""The folder of a store: made whole, written to by one process at a time, never holding half a state by its name."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

from filelock import FileLock, Timeout

from merging import os_calls
from merging.continual.manifest import NAME, STATES, Manifest, Unconfirmed, replace_manifest
from merging.errors import OptionError, OutputError
from merging.sources.links import refuse_link

__all__ = ["Busy", "found", "locked", "refuse_within", "remove", "unfinished"]

_LOCK, _UNFINISHED, _NEW = ".lock", ".unfinished.", ".new"


class Busy(OutputError):
    """Another process is writing to the store."""


@contextmanager
def locked(store: Path, wait: float | None) -> Iterator[None]:
    """Hold the store's lock, for which others are waited so many seconds (None: without end).

    The lock goes with its process, so none is ever stale. Raises :class:`Busy` if it was not to be had.
    """
    if wait is not None and not 0 <= wait < inf:
        raise OptionError(f"wait = {wait}: a number of seconds is needed, 0 or more")
    refuse_link(store / _LOCK)
    try:
        lock = FileLock(store / _LOCK, timeout=-1 if wait is None else wait)
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
    """Make an empty store, whole or not at all; what killed ones left beside it is removed.

    Raises :class:`~merging.errors.OutputError`.
    """
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{_NEW}"):
            shutil.rmtree(left, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(_NEW, f".{path.name}.", path.parent))
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        (new / STATES).mkdir()
        replace_manifest(new, manifest)
        os_calls.sync_folder(new)
        new.chmod(0o777 & ~os_calls.umask())
        new.rename(path)  # onto nothing, or an empty folder
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    try:
        os_calls.sync_folder(path.parent)
    except OSError as error:
        raise Unconfirmed(
            f"{path}: is made, but the disk does not confirm it ({error.strerror}): after a power cut it may be gone"
        ) from None


def refuse_within(output: Path) -> None:
    """Raise :class:`~merging.errors.OutputError` for a place inside a store, which removes what it does not know."""
    for folder in output.expanduser().resolve().parents:
        if (folder / NAME).is_file() and (folder / STATES).is_dir():
            raise OutputError(
                f"{output}: lies inside the store {folder}, which holds states alone: choose another place"
            )


def remove(folder: Path) -> None:
    """Take a state away; killed on the way, it leaves nothing that looks like a state."""
    going = folder.with_name(f"{_UNFINISHED}{folder.name}")
    with suppress(OSError):
        folder = folder.rename(going)
        if not folder.is_dir() or folder.is_symlink():
            folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
