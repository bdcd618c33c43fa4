"""A weights file that is written in any order: on the local disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from merging import os_calls
from merging.file_ranges import WriteBack

__all__ = ["CreateFile", "LocalFile", "OutputFile", "starts_with"]


class OutputFile(Protocol):
    """A file of known size whose bytes arrive in any order, each once, from any thread.

    Attributes:
        resumed: whether the bytes of a former run are there.
    """

    resumed: bool

    def write_at(self, data: memoryview, position: int) -> None:
        """Write bytes. Raises OSError, and :class:`~merging.errors.MergingError`."""

    def sync(self) -> None:
        """Make everything that was written durable."""

    def close(self) -> None:
        """Close the file."""


CreateFile = Callable[[Path, bytes, int, bool], OutputFile]
"""Creates a file from its path, its header, its size, and whether the file of a former run is gone on with."""


class LocalFile:
    """A file on the local disk, which takes its full size at once."""

    def __init__(self, path: Path, header: bytes, size: int, resume: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | (0 if resume else os.O_EXCL)
        self._fd = os.open(path, flags, 0o666)
        try:
            self.resumed = resume and starts_with(self._fd, header, size)
            if not self.resumed:
                if os.fstat(self._fd).st_size:
                    os.ftruncate(self._fd, 0)
                os_calls.reserve(self._fd, size)
                os_calls.write_at(self._fd, memoryview(header), 0)
        except BaseException:
            os.close(self._fd)
            raise
        self._write_back = WriteBack(self._fd)

    def write_at(self, data: memoryview, position: int) -> None:
        """Write bytes, and have the system begin to move them to the disk."""
        os_calls.write_at(self._fd, data, position)
        self._write_back.add(position, len(data))

    def sync(self) -> None:
        """Make everything that was written durable."""
        os_calls.sync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def starts_with(fd: int, header: bytes, size: int) -> bool:
    """Return whether an open file has a header and a size."""
    found = bytearray(len(header))
    if os.fstat(fd).st_size != size:
        return False
    os_calls.read_at(fd, memoryview(found), 0)
    return found == header
