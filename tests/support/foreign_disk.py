"""A file system that lacks calls: each fails with the error that such systems give."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from merging import os_calls

__all__ = ["LACKS", "lack"]

LACKS = {
    "links": ("EPERM", "EOPNOTSUPP", "ENOSYS"),
    "renames with flags": ("EINVAL", "ENOSYS"),
    "locks of folders": ("EBADF", "ENOLCK"),
    "locks": ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL"),
    "syncs of folders": ("EINVAL", "EBADF", "EACCES", "EPERM", "ENOSYS", "EOPNOTSUPP"),
    "syncs": ("EINVAL", "ENOSYS", "EOPNOTSUPP"),
    "fallocate": ("EOPNOTSUPP", "ENOSYS", "EINVAL"),
    "any size in advance": ("EOPNOTSUPP", "EPERM", "EINVAL"),
    "modes": ("EPERM", "EOPNOTSUPP", "ENOSYS"),
    "files without names": ("EBUSY", "EPERM"),
    "symbolic links": ("EPERM", "EOPNOTSUPP"),
    "announcements": ("EINVAL", "ENOSYS"),
}
"""Everything that file systems lack, with the errors that they give for it."""


def lack(monkeypatch: pytest.MonkeyPatch, things: Collection[str], number: int) -> None:
    """Take away things of :data:`LACKS`; the calls for them fail with an error."""
    import fcntl

    def refuse(*args: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    def refuse_for(is_refused: Callable[[int], bool], plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *args: object) -> object:
            return refuse() if is_refused(fd) else plain(fd, *args)

        return call

    if "links" in things:
        monkeypatch.setattr(os, "link", refuse)
    if "symbolic links" in things:
        monkeypatch.setattr(os, "symlink", refuse)
    if "renames with flags" in things:
        monkeypatch.setattr(os_calls, "_rename", lambda *_: number)
    if "locks" in things:
        monkeypatch.setattr(fcntl, "flock", refuse)
    elif "locks of folders" in things:
        monkeypatch.setattr(fcntl, "flock", refuse_for(_is_folder, fcntl.flock))
    if "syncs" in things:
        monkeypatch.setattr(os, "fsync", refuse)
    elif "syncs of folders" in things:
        monkeypatch.setattr(os, "fsync", refuse_for(_is_folder, os.fsync))
    if "any size in advance" in things:
        monkeypatch.setattr(os, "ftruncate", refuse)
    if {"any size in advance", "fallocate"} & {*things}:
        monkeypatch.setattr(os_calls, "allocate", refuse)
    if "modes" in things:
        monkeypatch.setattr(os, "chmod", refuse)
        monkeypatch.setattr(Path, "chmod", refuse)  # which has a function of its own in Python 3.10
    if "announcements" in things and hasattr(os, "posix_fadvise"):
        monkeypatch.setattr(os, "posix_fadvise", refuse)
    if "files without names" in things:
        _keep_open_names(monkeypatch, number)


def _is_folder(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def _keep_open_names(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Refuse files that never had a name, and to remove the name of a file that this process has open."""
    plain_open, plain_unlink = os.open, os.unlink

    def open_named(path: Any, flags: int, *args: Any, **named: Any) -> int:
        if hasattr(os, "O_TMPFILE") and flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return plain_open(path, flags, *args, **named)

    def unlink(path: Any, *args: Any, **named: Any) -> None:
        if str(path).startswith("/") and os.path.realpath(path) in _open_paths():
            raise OSError(number, os.strerror(number))
        plain_unlink(path, *args, **named)

    monkeypatch.setattr(os, "open", open_named)
    monkeypatch.setattr(os, "unlink", unlink)


def _open_paths() -> set[str]:
    return {os_calls.path_of(int(fd.name)) or "" for fd in Path("/proc/self/fd").iterdir()}
