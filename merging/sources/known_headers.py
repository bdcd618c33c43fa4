"""Headers of files that this process has read before: a file that is as it was is not parsed again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from pathlib import Path

from merging.sources.header import Header, read_header
from merging.sources.stamp import Stamp, stamp_of

__all__ = ["KnownHeaders", "read_known_header"]

_MOST = 1 << 23
"""The most bytes of all headers that are kept, as they are in the files: some 30 megabytes in memory."""

_LEAST = 1 << 9
"""The bytes that a header counts at least: parsed, a small one takes more memory than its text."""

_SETTLED = 3e9
"""The nanoseconds after which a change of a file surely shows in its stamp: the clocks of file systems are coarse."""


class KnownHeaders:
    """The headers that were read last, by the state of their files. Threads may share it."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._headers: OrderedDict[Stamp, Header] = OrderedDict()  # in the order of their last use
        self._held = 0
        self._lock = threading.Lock()

    def read(self, path: Path) -> Header:
        """Return the header of a file, as :func:`~merging.sources.header.read_header` does."""
        try:
            known = self._find(stamp_of(path.stat()))
        except (OSError, ValueError):
            known = None  # reading it says what is wrong
        if known is not None:
            return known
        header = read_header(path)
        assert header.stamp is not None
        if time.time_ns() - header.stamp.ctime_ns > _SETTLED:
            self._keep(header.stamp, header)
        return header

    def _find(self, stamp: Stamp) -> Header | None:
        with self._lock:
            if stamp in self._headers:
                self._headers.move_to_end(stamp)
            return self._headers.get(stamp)

    def _keep(self, stamp: Stamp, header: Header) -> None:
        """Keep a header, and drop those that were used longest ago, until all fit."""
        with self._lock:
            if stamp in self._headers:  # another thread read it too
                return
            self._headers[stamp] = header
            self._held += _size(header)
            while self._held > self._most:
                _, oldest = self._headers.popitem(last=False)
                self._held -= _size(oldest)


def _size(header: Header) -> int:
    """Return the bytes of a header in its file; the first tensor begins after them."""
    first = next(iter(header.entries.values()), None)
    return max(_LEAST, first.start if first else header.size)


_known = KnownHeaders()


def read_known_header(path: Path) -> Header:
    """Return the header of a file, which is parsed only if the file has changed since this process read it.

    Raises :class:`~merging.errors.FormatError` as :func:`~merging.sources.header.read_header` does.
    """
    return _known.read(path)
