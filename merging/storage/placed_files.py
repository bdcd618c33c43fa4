"""Files of known places, laid out by one process, which other processes write to and read from."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from merging import os_calls
from merging.errors import OutputError
from merging.file_ranges import WriteBack
from merging.maths.lazy_torch import Tensor
from merging.sources.stored import bytes_of

__all__ = ["PlacedFiles", "TensorPlace"]


class TensorPlace(NamedTuple):
    """The place of a tensor: its file, and the offset of its first byte there."""

    path: Path
    offset: int


class PlacedFiles:
    """Tensors at places in files that exist. The files are opened when they are needed, and may be used by any thread.

    Raises :class:`~merging.errors.OutputError` for errors of the disk, and where this machine does not see a file.
    """

    def __init__(self, places: Mapping[str, TensorPlace]) -> None:
        self._places = places
        self._files: dict[Path, tuple[int, WriteBack]] = {}
        self._lock = threading.Lock()
        self._written: Counter[str] = Counter()

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write the elements ``values`` (one axis, contiguous, on the CPU) at position ``start`` of a tensor."""
        path, offset = self._places[name]
        data = bytes_of(values)
        try:
            fd, write_back = self._open(path)
            os_calls.write_at(fd, data, offset + start * values.itemsize)
            write_back.add(offset + start * values.itemsize, len(data))
        except OSError as error:
            raise OutputError(f"{path}: {name} cannot be written: {error.strerror}") from None
        with self._lock:
            self._written[name] += len(data)

    def read(self, name: str, buffer: Tensor, start: int) -> None:
        """Fill a buffer with elements of a tensor."""
        path, offset = self._places[name]
        try:
            os_calls.read_at(self._open(path)[0], bytes_of(buffer), offset + start * buffer.itemsize)
        except (OSError, EOFError) as error:
            raise OutputError(f"{path}: {name} cannot be read: {error}") from None

    def advise(self, name: str, start: int, count: int) -> None:
        """Do nothing: the files were written just now."""

    def take_written(self) -> Counter[str]:
        """Return the bytes that were written since the last call, by tensor."""
        with self._lock:
            written, self._written = self._written, Counter()
            return written

    def sync(self) -> None:
        """Make everything that was written since the last :meth:`close` durable. Raises OSError."""
        for fd, _ in [*self._files.values()]:
            os_calls.sync(fd)

    def close(self) -> None:
        """Close the files; the next use opens them again."""
        with self._lock:
            while self._files:
                with suppress(OSError):  # of a network's file system, which sync() met before
                    os.close(self._files.popitem()[1][0])

    def _open(self, path: Path) -> tuple[int, WriteBack]:
        with self._lock:
            if path not in self._files:
                try:
                    fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
                except FileNotFoundError:
                    raise OutputError(
                        f"{path}: is not there on {os.uname().nodename}: all nodes of the cluster need the folder of "
                        f"the output under the same path, on a shared file system"
                    ) from None
                self._files[path] = fd, WriteBack(fd)
            return self._files[path]
