"""Locks of files and of hidden folders, also on file systems that lock nothing.

A lock of the operating system ends with its process. Where a file system has none, a file with the owner's process and
machine stands for it: it is stale once that process is dead, and never taken from another machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from merging import os_calls

__all__ = ["LOCK_FILES", "FolderLock", "lock_file", "lock_folder"]

_LOCK, _OWNER = "lock", ".owner"

LOCK_FILES = (_LOCK, f"{_LOCK}{_OWNER}")
"""The names of the files in a hidden folder that cannot be locked itself."""


class FolderLock:
    """The lock of a hidden folder, until it is released or the process dies."""

    def __init__(self, folder: Path, fd: int | None = None, file: BaseFileLock | None = None) -> None:
        self.folder = folder
        self._fd, self._file = fd, file

    def is_of(self, folder: Path) -> bool:
        """Return whether the path still leads to the locked folder. Raises FileNotFoundError if it is gone."""
        return self._fd is None or os.path.samestat(os.fstat(self._fd), folder.stat())

    def release(self) -> None:
        """Give up the lock."""
        if self._fd is not None:
            os.close(self._fd)
        if self._file is not None:
            self._file.release()
        self._fd = self._file = None

    def remove_folder(self) -> None:
        """Remove the folder. Raises OSError for anything that cannot be removed.

        The files of the lock go last and unlocked, since some network file systems keep the names of open files.
        """
        for path in self.folder.iterdir() if self._file is not None else ():
            if path.name not in LOCK_FILES:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self._file is not None:
            self.release()
        shutil.rmtree(self.folder)


def lock_folder(folder: Path, new: bool = False) -> FolderLock | None:
    """Lock a hidden folder. Return None if another process holds it, or if nothing says that none does.

    File systems that lock no folders (NFS), or that open none, have a file for it, which is made in a ``new`` folder.
    Raises OSError for a folder that cannot be opened.
    """
    fd = os_calls.open_folder(folder)
    granted = None if fd is None else os_calls.claim(fd)
    if granted:
        return FolderLock(folder, fd)
    if fd is not None:
        os.close(fd)
    if granted is False or not (new or any((folder / name).exists() for name in LOCK_FILES)):
        return None
    file = lock_file(folder / _LOCK)
    return None if file is None else FolderLock(folder, file=file)


def lock_file(path: Path, wait: float | None = 0.0) -> BaseFileLock | None:
    """Lock a file, which is made if it is missing. Return None if another process holds it for longer than ``wait``.

    ``wait`` is in seconds, None for any time. Without locks in the file system, ``PATH.owner`` stands for the lock.
    Raises OSError.
    """
    kind, name = (FileLock, path) if _has_locks(path) else (SoftFileLock, path.with_name(f"{path.name}{_OWNER}"))
    lock = kind(name, timeout=-1 if wait is None else wait, thread_local=False)
    # some versions of filelock only remove the record of a dead owner in an attempt without waiting
    for _ in range(1 if kind is FileLock else 2):
        try:
            lock.acquire()
        except Timeout:
            continue
        return lock
    return None


def _has_locks(path: Path) -> bool:
    """Return whether the system can lock a file."""
    if sys.platform == "win32":  # where the library locks in its own way
        return True
    fd = os_calls.without_links(str(path), os.O_RDWR | os.O_CREAT)
    try:
        return os_calls.claim(fd) is not None
    finally:
        os.close(fd)
