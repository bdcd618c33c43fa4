"""Calls to the operating system: positional reads and writes, preallocation, durable folders, locks, signals.

Linux is served directly. Where a call does not exist (macOS, Windows, network file systems), a plain fallback does the
same, slower or with a weaker guarantee. Everything that differs between systems is in this file, except for memory
(:mod:`merging.engine.process_memory`) and for ranges of files that are announced or copied
(:mod:`merging.file_ranges`)."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

__all__ = [
    "allow_open_files",
    "claim",
    "create",
    "delay_signals",
    "exchange",
    "kind_of",
    "open_folder",
    "open_regular",
    "path_of",
    "read_at",
    "rename_new",
    "reserve",
    "set_mode",
    "sync",
    "sync_folder",
    "umask",
    "without_links",
    "write_at",
]

_PIECE = 1 << 26
"""The most bytes in one call; Linux moves at most 2 GiB at once."""

_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})
"""The errors with which a file system refuses a call that it does not have."""

_seeking = threading.Lock()
"""Guards the file position on systems without positional calls."""


def read_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` (bytes) from ``offset`` on. Raises EOFError if the file ends before."""
    done = 0
    while done < len(buffer):
        read = _read_some(fd, buffer[done : done + _PIECE], offset + done)
        if read == 0:
            raise EOFError(f"the file ends {len(buffer) - done} bytes too early")
        done += read


def _read_some(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of ``buffer`` (bytes) at ``offset``. Raises OSError, also for a full disk."""
    done = 0
    while done < len(buffer):
        piece = buffer[done : done + _PIECE]
        if hasattr(os, "pwrite"):
            done += os.pwrite(fd, piece, offset + done)
        else:
            with _seeking:
                os.lseek(fd, offset + done, os.SEEK_SET)
                done += os.write(fd, piece)


def reserve(fd: int, size: int) -> None:
    """Give a new file its full size, and reserve the space if the system can, so that a full disk shows early.

    A file system that can do neither lets the file grow as it is written.
    """
    with _unless_unsupported():
        allocate(fd, size)
        return
    with _unless_unsupported():
        os.ftruncate(fd, size)


def allocate(fd: int, size: int) -> None:
    """Reserve the space of a file. Raises OSError, also where the file system cannot.

    The C library's posix_fallocate would write into each block there, which takes hours over a network.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" and ctypes.sizeof(ctypes.c_long) == 8 else None
    if libc is None or not hasattr(libc, "fallocate"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while size and libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(size)) != 0:
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Suppress the errors of calls that a file system does not have."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync(fd: int) -> None:
    """Return when the file's bytes are on the disk, as far as the file system can say."""
    if sys.platform == "darwin":  # where fsync leaves them in the cache of the disk
        import fcntl

        with suppress(OSError):  # of file systems without it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    with _unless_unsupported():
        os.fsync(fd)


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file or folder, where the file system keeps permissions."""
    with _unless_unsupported():
        path.chmod(mode)


def allow_open_files(count: int) -> int:
    """Raise the limit of open files to ``count``, as far as the system allows. Return the limit."""
    try:
        import resource
    except ImportError:
        return count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or count <= soft:
        return count
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft
    return wanted


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(mode: int) -> str:
    """Return in words what kind of file has this mode."""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a file")


def open_regular(path: Path) -> int:
    """Open a regular file for reading, and return its descriptor. Raises OSError for anything else, without waiting."""
    _require_regular(path.stat().st_mode)  # before it is opened, which can do something to a device
    wanted = ("O_NONBLOCK", "O_NOCTTY", "O_BINARY")
    fd = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in wanted))
    try:
        _require_regular(os.fstat(fd).st_mode)
    except OSError:
        os.close(fd)
        raise
    return fd


def path_of(fd: int) -> str | None:
    """Return the path of an open file, without links; None where the system does not say."""
    try:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return None
    return path if path.startswith("/") else None


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, and should be a file")


def create(path: Path) -> BinaryIO:
    """Create a new file for writing. Raises OSError if the name exists, even as a dangling link."""
    wanted = ("O_NOFOLLOW", "O_BINARY")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | sum(getattr(os, flag, 0) for flag in wanted)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def without_links(path: str, flags: int) -> int:
    """Open a file like :func:`os.open`, without following a link at the end of the path."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def umask() -> int:
    """Return the permission bits that new files and folders do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_folder(path: Path) -> int | None:
    """Open a folder and return its descriptor; None on systems that open only files."""
    if sys.platform == "win32" or not hasattr(os, "O_DIRECTORY"):
        return None
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk; some systems cannot sync a folder, and do nothing here."""
    try:
        fd = open_folder(path)
    except IsADirectoryError:
        return
    if fd is None:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {*_UNSUPPORTED, errno.EBADF, errno.EACCES}:  # of file systems that sync files only
            raise
    finally:
        os.close(fd)


def exchange(one: Path, other: Path) -> bool:
    """Swap two existing paths in one step, so that neither name is ever missing. Return False if that is impossible."""
    return _rename(one, other, 2) == 0  # RENAME_EXCHANGE


def rename_new(path: Path, new: Path) -> bool:
    """Rename a file or folder to a name that nothing has. Return False if the file system cannot do it in one step.

    Raises FileExistsError if something has the name.
    """
    error = _rename(path, new, 1)  # RENAME_NOREPLACE
    if error == errno.EEXIST:
        raise FileExistsError(error, os.strerror(error), str(new))
    return error == 0


def _rename(one: Path, other: Path, flag: int) -> int:
    """Rename with a flag of Linux, and return the number of the error; 0 for none."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "renameat2"):
        return errno.ENOSYS
    here = -100  # AT_FDCWD
    done = libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), flag) == 0
    return 0 if done else ctypes.get_errno()


def claim(fd: int) -> bool | None:
    """Lock an open file or folder until it is closed or the process dies. Return False if another process holds it.

    Systems without such locks grant none (None), so that nothing is ever considered abandoned there.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def delay_signals() -> Iterator[None]:
    """Delay signals until the end of the block, so that none leaves its work half done.

    Only signals with a handler in Python are delayed, since a handler may raise anywhere in the main thread. Other
    threads receive no signals.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[tuple[int, FrameType | None]] = []
    try:
        for number in numbers if threading.current_thread() is threading.main_thread() else ():
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, lambda *signalled: waiting.append(signalled))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting:
            handlers[number](number, frame)
