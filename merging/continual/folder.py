"""The folder of a store: made whole, written to by one process at a time, never holding half a state by its name."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

from filelock import FileLock, Timeout

from merging import os_calls
from merging.continual.manifest import NAME, STATES, Manifest, replace_manifest
from merging.errors import OptionError, OutputError
from merging.sources.links import refuse_link
from merging.storage.staging import StagedOutput

__all__ = ["Busy", "found", "locked", "refuse_within", "remove", "states", "unfinished"]

_LOCK, _UNFINISHED = ".lock", ".unfinished."

_STATE = re.compile(rf"\d{{6,}}-\w+|{re.escape(_UNFINISHED)}.+")
"""How states are called: by number and hash, or as one that is being written or removed."""


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


@contextmanager
def unfinished(store: Path) -> Iterator[Path]:
    """A new folder for a state that is being written, which is removed if it has no other name by the end."""
    folder = None
    try:
        try:
            with os_calls.uninterrupted():
                folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=store / STATES))
        except OSError as error:
            raise OutputError(f"{store}: cannot be written to: {error.strerror}") from None
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def states(store: Path) -> list[Path]:
    """All states in a store's folder, finished or not, and nothing that somebody else has put there."""
    return sorted(path for path in (store / STATES).iterdir() if _STATE.fullmatch(path.name))


def found(path: Path, manifest: Manifest) -> None:
    """Make an empty store, whole or not at all. Raises :class:`~merging.errors.OutputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror}") from None
    with StagedOutput(path, overwrite=False, file=False) as staged:
        (staged.folder / STATES).mkdir()
        replace_manifest(staged.folder, manifest)
        with suppress(OSError):
            path.rmdir()  # an empty folder makes way
        staged.commit()


def refuse_within(output: Path) -> None:
    """Raise :class:`~merging.errors.OutputError` for a place inside a store, which holds states alone."""
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
