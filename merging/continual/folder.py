"""The folder of a store: created whole, with one writer at a time, and no half-written state under a state's name."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

from merging import os_calls
from merging.continual.manifest import NAME, STATES, Manifest, replace_manifest
from merging.errors import OptionError, OutputError
from merging.sources.links import refuse_link
from merging.storage.locks import lock_file
from merging.storage.staging import StagedOutput

__all__ = ["Busy", "create_store", "disk_use", "lock", "new_state", "refuse_within", "remove_state", "state_folders"]

_LOCK, _UNFINISHED = ".lock", ".unfinished."

_STATE = re.compile(rf"\d{{6,}}-\w+|{re.escape(_UNFINISHED)}.+")
"""The names of states: number and hash, or a mark that the state is being written or removed."""


class Busy(OutputError):
    """Another process is writing to the store."""


@contextmanager
def lock(store: Path, wait: float | None) -> Iterator[None]:
    """Hold the store's lock; wait ``wait`` seconds for another writer (None: without end).

    The lock ends with its process, so it is never stale: see :mod:`merging.storage.locks`. Raises :class:`Busy` if
    another process kept it.
    """
    if wait is not None and not 0 <= wait < inf:
        raise OptionError(f"wait = {wait}: a number of seconds is needed, 0 or more")
    refuse_link(store / _LOCK)
    try:
        file_lock = lock_file(store / _LOCK, wait)
    except OSError as error:
        raise OutputError(f"{store}: cannot be written to: {error.strerror}") from None
    if file_lock is None:
        raise Busy(f"{store}: another process is writing to this store: try again later")
    try:
        yield
    finally:
        file_lock.release()


@contextmanager
def new_state(store: Path) -> Iterator[Path]:
    """Make a folder for a state that is being written. It is removed at the end unless it was renamed by then."""
    folder = None
    try:
        try:
            with os_calls.delay_signals():
                folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=store / STATES))
        except OSError as error:
            raise OutputError(f"{store}: cannot be written to: {error.strerror}") from None
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def state_folders(store: Path) -> list[Path]:
    """Return the folders of all states, finished or not; files of others in the same place are left out."""
    return sorted(path for path in (store / STATES).iterdir() if _STATE.fullmatch(path.name))


def disk_use(store: Path, manifest: Manifest) -> dict[str, int]:
    """Return the number and the bytes of the states on the disk, and the bytes that gc frees if it keeps the last."""
    last = {Path(part.file).parent.name for step in manifest.steps[-1:] for part in step.parts.values()}
    sizes: dict[str, int] = {}
    for folder in state_folders(store):
        with suppress(OSError):  # a writer may remove it meanwhile
            sizes[folder.name] = sum(file.stat().st_size for file in folder.iterdir())
    total = sum(sizes.values())
    return {
        "states": len(sizes),
        "bytes": total,
        "freed_by_gc": total - sum(size for name, size in sizes.items() if name in last),
    }


def create_store(path: Path, manifest: Manifest) -> None:
    """Create an empty store, whole or not at all. Raises :class:`~merging.errors.OutputError`."""
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
    """Raise :class:`~merging.errors.OutputError` for an output inside a store, which holds nothing but states."""
    for folder in output.expanduser().resolve().parents:
        if (folder / NAME).is_file() and (folder / STATES).is_dir():
            raise OutputError(f"{output}: is inside the store {folder}, which holds only states: choose another place")


def remove_state(folder: Path) -> None:
    """Remove a state; a process that is killed meanwhile leaves nothing that looks like a state."""
    going = folder.with_name(f"{_UNFINISHED}{folder.name}")
    with suppress(OSError):
        folder = folder.rename(going)
        if not folder.is_dir() or folder.is_symlink():
            folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
