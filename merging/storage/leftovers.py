"""Hidden folders of outputs that are being built, and what killed runs left in them.

A folder ``.NAME.*.partial`` next to a destination is locked by its run: ``out`` in it becomes the output, ``scratch``
is for temporary files, and ``old`` is the replaced output where two names cannot be exchanged in one step. A folder
without a lock was left by a run that was killed. If its ``journal`` states the identity of that run, a later run with
the same identity goes on in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from merging import os_calls
from merging.errors import InputError, MergingError, OutputError
from merging.sources.small_files import LIST_LIMIT, read_json, read_text
from merging.storage.atomic import replace_file, temporary_paths
from merging.storage.locks import LOCK_FILES, FolderLock, lock_folder

__all__ = [
    "JOURNAL",
    "OLD",
    "OUT",
    "SCRATCH",
    "Identity",
    "Leftover",
    "Unfinished",
    "create_partial",
    "find_abandoned",
    "find_leftovers",
    "find_unfinished",
    "has_entries",
    "mark_placing",
    "put_back",
    "take_over",
    "write_identity",
]

PARTIAL, OUT, OLD, SCRATCH, JOURNAL = ".partial", "out", "old", "scratch", "journal"

_IDENTITY, _PLACING = "identity.json", "placing"

_HIDDEN = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<kind>\.partial|\.new)")

_LONG = 100
"""Characters of a value that messages do not quote any more."""

_OLD_FILE = 60.0
"""Seconds after which a file that was to be renamed has no writer any more."""

Identity = Mapping[str, str]
"""All that decides the bytes of an output: texts by name."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A folder in which a run stopped that can go on: its path, the run's identity, and its bytes on the disk."""

    folder: Path
    identity: Identity
    bytes: int

    def difference(self, now: Identity) -> str | None:
        """Return the first difference of a run from this one as a clause; None if there is none."""
        for name in dict.fromkeys([*now, *self.identity]):
            then, stated = self.identity.get(name), now.get(name)
            if then == stated:
                continue
            if max(len(then or ""), len(stated or "")) > _LONG:
                return f"{name} is another one now"
            return f"{name} was {then or 'not there'}, and is {stated or 'not there'} now"
        return None


@dataclass(frozen=True, slots=True)
class Leftover:
    """A leftover of a killed run: a hidden folder, or a file that was to be renamed.

    Attributes:
        path: the hidden folder or file.
        output: the path of the run's output.
        bytes: its size on the disk.
        modified: the time of its last change, in seconds since 1970.
        resumable: whether the same command goes on with it.
        holds_old: whether the output that was to be replaced is in it, and nothing is in its place.
    """

    path: Path
    output: Path
    bytes: int = 0
    modified: float = 0.0
    resumable: bool = False
    holds_old: bool = False

    def to_dict(self) -> dict[str, object]:
        """Return the same in plain values."""
        return {**asdict(self), "path": str(self.path), "output": str(self.output)}

    def remove(self) -> None:
        """Remove it; an output that was to be replaced is moved back first.

        Raises :class:`~merging.errors.OutputError`.
        """
        try:
            if self.path.is_dir():
                self._remove_folder()
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be removed: {error.strerror or error}") from None

    def _remove_folder(self) -> None:
        lock = _claim(self.path)
        if lock is None:
            return  # a run goes on with it, or has removed it
        try:
            if put_back(self.path, self.output) is not None:
                raise OutputError(f"{self.path}: the output in it cannot be moved back to {self.output}")
            lock.remove_folder()
        finally:
            lock.release()


def find_leftovers(folder: Path) -> list[Leftover]:
    """Return what killed runs left in a folder, by name. Folders of living runs are not among it.

    Raises :class:`~merging.errors.InputError` for a folder that cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        raise InputError(f"{folder}: there is no such folder") from None
    except NotADirectoryError:
        raise InputError(f"{folder}: is a file: name the folder that it is in") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from None
    found = []
    for path in paths:
        match = _HIDDEN.fullmatch(path.name)
        if match is None or path.is_symlink():
            continue
        output = path.with_name(match["name"])
        with suppress(FileNotFoundError):
            status = path.lstat()
            if path.is_dir() and match["kind"] == PARTIAL:
                found += _leftover_folder(path, output)
            elif path.is_file() and match["kind"] == ".new" and time.time() - status.st_mtime > _OLD_FILE:
                found.append(Leftover(path, output, status.st_size, status.st_mtime))
    return found


def _leftover_folder(path: Path, output: Path) -> list[Leftover]:
    lock = _claim(path)
    if lock is None:
        return []
    try:
        if not _is_ours(path):
            return []
        aside = os.path.lexists(path / OLD) and not os.path.lexists(output)
        times = [each.lstat().st_mtime for each in [path, *path.rglob("*")]]
        return [Leftover(path, output, disk_usage(path), max(times), find_unfinished(path) is not None, aside)]
    finally:
        lock.release()


def _is_ours(folder: Path) -> bool:
    """Return whether a folder holds nothing but the parts of a temporary folder."""
    return {each.name for each in folder.iterdir()} <= {OUT, OLD, SCRATCH, JOURNAL, *LOCK_FILES}


def create_partial(destination: Path) -> tuple[Path, FolderLock]:
    """Create a temporary folder for an output. Return it with its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(PARTIAL, f".{destination.name}.", destination.parent))
        lock = None
        try:
            lock = lock_folder(folder, new=True)
            if lock is not None and lock.is_of(folder):
                return folder, lock
        except FileNotFoundError:
            pass
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # another merge to this destination began just now, and considered the folder abandoned
        with suppress(OSError):
            folder.rmdir()
        if lock is not None:
            lock.release()


def find_abandoned(destination: Path) -> Iterator[FolderLock]:
    """Yield the locks of temporary folders that no living run holds; each is locked while the caller uses it."""
    for folder in temporary_paths(destination, PARTIAL):
        lock = _claim(folder)
        if lock is None:
            continue
        try:
            if _is_ours(folder):
                yield lock
        except FileNotFoundError:
            pass
        finally:
            lock.release()


def _claim(folder: Path) -> FolderLock | None:
    """Return the lock of a temporary folder, None for a folder that a living run holds."""
    try:
        return None if folder.is_symlink() else lock_folder(folder)
    except OSError:  # no folder, or it was removed just now
        return None


def put_back(folder: Path, destination: Path) -> Path | None:
    """Move an output that was moved aside back, if nothing took its place. Return its path if that fails."""
    old = folder / OLD
    if not os.path.lexists(old) or os.path.lexists(destination):
        return None
    try:
        old.rename(destination)
    except OSError:
        return old
    return None


def write_identity(folder: Path, identity: Identity) -> None:
    """Make a temporary folder one in which a later run with the same identity goes on. Raises OSError."""
    (folder / JOURNAL).mkdir()
    replace_file(folder / JOURNAL / _IDENTITY, json.dumps(dict(identity)).encode())
    os_calls.sync_folder(folder / JOURNAL)
    os_calls.sync_folder(folder)


def mark_placing(folder: Path) -> None:
    """Note the folder that is about to take the place of the output, since an exchange gives its name to the old one.

    Raises OSError.
    """
    replace_file(folder / JOURNAL / _PLACING, _name_inode(folder / OUT).encode())
    os_calls.sync_folder(folder / JOURNAL)


def _name_inode(path: Path) -> str:
    status = path.stat()
    return f"{status.st_dev} {status.st_ino}"


def find_unfinished(folder: Path) -> Unfinished | None:
    """Return the run that stopped in a temporary folder, None if no run can go on in it."""
    placing = folder / JOURNAL / _PLACING
    try:
        if not (folder / OUT).is_dir():
            return None
        if placing.exists() and read_text(placing) != _name_inode(folder / OUT):
            return None  # the exchange is done: this is the output that was replaced
        identity = read_json(folder / JOURNAL / _IDENTITY, LIST_LIMIT)
    except (OSError, MergingError):
        return None
    if not all(isinstance(each, str) for each in identity.values()):
        return None
    return Unfinished(folder, identity, disk_usage(folder))


def has_entries(journal: Path) -> bool:
    """Return whether a journal's folder records any finished work."""
    return any(path.stat().st_size for ending in ("jsonl", "sweep") for path in journal.glob(f"*.{ending}"))


def _bytes_on_disk(status: os.stat_result) -> int:
    """Return the bytes that a file takes, which for a file with holes is less than its size."""
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else 512 * int(blocks)


def disk_usage(folder: Path) -> int:
    """Return the bytes of all files in a folder on the disk."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += _bytes_on_disk(path.lstat()) if not path.is_dir() else 0
    return total


def take_over(destination: Path, identity: Identity) -> tuple[Path, FolderLock] | None:
    """Return the folder of a run with this identity that stopped, and its lock; else None."""
    for folder in [*temporary_paths(destination, PARTIAL)]:
        lock = _claim(folder)
        if lock is None:
            continue
        found = find_unfinished(folder)
        if found is not None and found.difference(identity) is None:
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
            return folder, lock
        lock.release()
    return None
