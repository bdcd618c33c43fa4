"""Open files that hold the bytes of tensors, and refuse to be read once somebody writes to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn, Protocol

from merging import os_calls
from merging.errors import FormatError, InputError
from merging.file_ranges import ReadAhead
from merging.sources.stamp import Stamp, stamp_of

__all__ = ["File", "Holder"]

_NEEDED_FILES, _WANTED_FILES = 8, 64
"""Open files needed besides the inputs (the output, a spool, locks, a database), and the number with some for
libraries."""


class Holder(Protocol):
    """A holder of the bytes of tensors: a file on this disk, or one on the Hub that is downloaded when it is read."""

    path: Path

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def at_hand(self) -> bool:
        """Whether it is on this machine."""

    def identity(self) -> str:
        """Return a text that identifies its content."""

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes from ``offset`` on. Raises :class:`~merging.errors.FormatError`."""

    def advise(self, offset: int, nbytes: int) -> None:
        """Announce that these bytes are needed soon."""


class File:
    """An open file. It stays open as long as one of its tensors lives, and can be read even if it is renamed.

    All its bytes are read in one state: once somebody writes to it, reading raises an error.
    """

    __slots__ = ("_ahead", "fd", "path", "stamp")

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    @property
    def at_hand(self) -> bool:
        return True

    def identity(self) -> str:
        return str(self.path)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os_calls.open_regular(path)
        # the lowest free number is about the count of open files
        allowed = os_calls.allow_open_files(self.fd + _WANTED_FILES)
        if allowed < self.fd + _NEEDED_FILES:
            raise InputError(
                f"{path}: the system allows this process {allowed} open files, and {self.fd} are open already, with "
                f"{_NEEDED_FILES} more to come: take fewer inputs at once, or raise its limit (ulimit -n)"
            )
        self.stamp = stamp_of(os.fstat(self.fd))
        self._ahead = ReadAhead(self.fd)

    def __copy__(self) -> File:
        return self  # two objects with one descriptor would close it twice, and the second time another file's

    def __deepcopy__(self, memo: object) -> File:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path}: an open file cannot be pickled")

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes from ``offset`` on. Raises :class:`~merging.errors.FormatError`."""
        try:
            os_calls.read_at(self.fd, into, offset)
        except EOFError as error:
            raise FormatError(f"{self.path}: {error}: it was cut while it was read") from None
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read: {error.strerror}") from None
        self.check()

    def check(self) -> None:
        """Raise :class:`~merging.errors.FormatError` if somebody wrote to the file since it was opened."""
        status = os.fstat(self.fd)
        if self.stamp.is_status(status):
            return
        now = stamp_of(status)
        if not self.stamp.is_same_state(now) and not self._was_moved(now):
            how = "was cut" if now.size < self.stamp.size else "changed"
            raise FormatError(f"{self.path}: {how} while it was read: try again when it is complete")
        self.stamp = now

    def _was_moved(self, now: Stamp) -> bool:
        """Whether only the name has changed, which also updates the time of the last change of status."""
        try:
            there = stamp_of(self.path.stat())
        except OSError:
            return now[:4] == self.stamp[:4]
        return now[:4] == self.stamp[:4] and there[:2] != now[:2]

    def check_place(self) -> None:
        """Check as :meth:`check` does, and that the path still leads to this file: some readers open it by its path."""
        try:
            there = stamp_of(self.path.stat())
        except OSError:
            there = None
        if there is None or there[:2] != self.stamp[:2]:
            raise FormatError(f"{self.path}: changed while it was read: try again when it is complete")
        self.check()

    def advise(self, offset: int, nbytes: int) -> None:
        """Have the system read these bytes ahead."""
        self._ahead.announce(offset, nbytes)
