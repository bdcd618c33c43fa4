"""Headers of files that this process has read before: a file that is as it was is not parsed again."""

from __future__ import annotations

import time
from pathlib import Path

from merging.sources.header import Header, read_header
from merging.sources.stamp import Stamp, stamp_of

__all__ = ["KnownHeaders", "read_known_header"]

_MOST = 1 << 16
"""The most tensors in all headers that are kept: some 25 megabytes."""

_SETTLED = 3e9
"""The nanoseconds after which a change of a file surely shows in its stamp: the clocks of file systems are coarse."""


class KnownHeaders:
    """The headers that were read last, by the state of their files. Threads may share it."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._headers: dict[Stamp, Header] = {}  # in the order of their last use

    def read(self, path: Path) -> Header:
        """Return the header of a file, as :func:`~merging.sources.header.read_header` does."""
        try:
            known = self._headers.pop(stamp_of(path.stat()), None)
        except (OSError, ValueError):
            known = None  # reading it says what is wrong
        header = known or read_header(path)
        assert header.stamp is not None
        if known or time.time_ns() - header.stamp.ctime_ns > _SETTLED:
            self._headers[header.stamp] = header
            self._drop_oldest()
        return header

    def _drop_oldest(self) -> None:
        headers = list(self._headers.items())
        total = sum(len(header.entries) for _, header in headers)
        for stamp, header in headers:
            if total <= self._most:
                break
            self._headers.pop(stamp, None)
            total -= len(header.entries)


_known = KnownHeaders()


def read_known_header(path: Path) -> Header:
    """Return the header of a file, which is parsed only if the file has changed since this process read it.

    Raises :class:`~merging.errors.FormatError` as :func:`~merging.sources.header.read_header` does.
    """
    return _known.read(path)
