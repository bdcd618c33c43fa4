"""Calls about ranges of a file that change nothing in it: reading ahead, starting to write back, and forgetting."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress

__all__ = ["ReadAhead", "WriteBack", "forget"]

_AT_ONCE = 1 << 23
"""Bytes that are announced in one call. Many small tensors share a call, which costs more than reading some of them."""

_SYNC_FILE_RANGE_WRITE = 2


class ReadAhead:
    """Announcements of the ranges of a file that are needed soon: each byte once, and some bytes beyond."""

    __slots__ = ("_fd", "_known")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._known = (0, 0)

    def announce(self, offset: int, length: int) -> None:
        """Have the system read a range ahead, unless the last announcements did; do nothing where it cannot."""
        first, last = self._known
        if first <= offset and offset + length <= last:
            return
        start = last if first <= offset <= last else offset
        stop = max(offset + length, start + _AT_ONCE)
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._fd, start, stop - start, os.POSIX_FADV_WILLNEED)
        self._known = offset, stop  # another sweep starts in front of it, and announces all again


class WriteBack:
    """New bytes of a file that the system begins to write to the disk early, so that a sync at the end waits less."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._waiting = self._first = self._last = 0

    def add(self, offset: int, length: int) -> None:
        """Count bytes that were written; some megabytes of them begin to be written to the disk together."""
        with self._lock:
            self._first = min(self._first, offset) if self._waiting else offset
            self._last = max(self._last, offset + length) if self._waiting else offset + length
            self._waiting += length
            if self._waiting < _AT_ONCE:
                return
            first, last, self._waiting = self._first, self._last, 0
        _begin_to_write(self._fd, first, last - first)


def _begin_to_write(fd: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" and ctypes.sizeof(ctypes.c_long) == 8 else None
    if libc is not None and hasattr(libc, "sync_file_range"):
        libc.sync_file_range(fd, ctypes.c_long(offset), ctypes.c_long(length), _SYNC_FILE_RANGE_WRITE)


def forget(fd: int) -> None:
    """Have the system forget the pages of a file that are on the disk, where it does so."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
