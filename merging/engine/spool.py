"""Merged changes set aside until the factor that scales them is known."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from merging.errors import OutputError
from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.os_calls import read_at, sync, write_at

__all__ = ["Spool", "open_scratch"]


@dataclass(frozen=True, slots=True)
class _Part:
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def plain(self) -> list[Any]:
        """Return the part in plain values, without its device."""
        return [self.offset, list(self.shape), str(self.dtype).removeprefix("torch.")]

    @classmethod
    def of(cls, plain: Sequence[Any], device: torch.device) -> _Part:
        """Return a part from its plain values."""
        offset, shape, dtype = plain
        return cls(offset, torch.Size(shape), getattr(torch, dtype), device)


class Spool:
    """Keeps changes, factors as factors, in a file without a name: it is gone when the program ends, in any way.

    ``folder`` is the place of the file. With a ``path`` the file has a name, and a later run can read the changes whose
    places it knows. Several threads may use a spool at once. Raises :class:`~merging.errors.OutputError` when the disk
    is full.
    """

    def __init__(self, folder: Path | None, path: Path | None = None) -> None:
        self.folder = folder
        self.path = path
        self._file: IO[bytes] | None = None
        self._end = 0
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[tuple[_Part, ...], tuple[tuple[int, ...], bool] | None]] = {}

    def put(self, name: str, delta: Delta) -> None:
        """Keep a change."""
        parts = (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.value,)
        shape = (delta.shape, delta.transposed) if isinstance(delta, LowRank) else None
        self._kept[name] = tuple(self._write(part) for part in parts), shape

    def take(self, name: str) -> Delta | None:
        """Return the change that was kept under a name, if any."""
        if name not in self._kept:
            return None
        parts, shape = self._kept[name]
        values = [self._read(part) for part in parts]
        return Dense(values[0]) if shape is None else LowRank(values[0], values[1], *shape)

    def places(self, after: int = 0) -> dict[str, Any]:
        """Return the places of the changes that were kept, but the first ``after``, in plain values."""
        kept = list(self._kept.items())[after:]
        return {name: {"parts": [part.plain() for part in parts], "factors": shape} for name, (parts, shape) in kept}

    def restore(self, places: Mapping[str, Any], device: torch.device) -> None:
        """Know the changes at these places in the file from before."""
        for name, place in places.items():
            parts = tuple(_Part.of(part, device) for part in place["parts"])
            factors = place["factors"]
            self._kept[name] = parts, None if factors is None else (tuple(factors[0]), factors[1])
            self._end = max([self._end, *(part.offset + prod(part.shape) * part.dtype.itemsize for part in parts)])

    def sync(self) -> None:
        """Make the changes that were kept durable. Raises OSError."""
        if self._file is not None:
            sync(self._file.fileno())

    def close(self) -> None:
        """Free the space of a file without a name."""
        if self._file is not None:
            self._file.close()

    def _write(self, values: Tensor) -> _Part:
        host = values.detach().contiguous().cpu()
        try:
            with self._lock:
                file = self._open()
                offset, self._end = self._end, self._end + host.nbytes
            write_at(file.fileno(), _bytes(host), offset)
        except OSError as error:
            raise OutputError(
                f"{self.folder or tempfile.gettempdir()}: merged changes cannot be set aside: {error.strerror}"
            ) from None
        return _Part(offset, values.shape, values.dtype, values.device)

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = open_scratch(self.folder, self.path)
        return self._file

    def _read(self, part: _Part) -> Tensor:
        values = torch.empty(part.shape, dtype=part.dtype)
        try:
            with self._lock:
                file = self._open()
            read_at(file.fileno(), _bytes(values), part.offset)
        except (OSError, EOFError) as error:
            raise OutputError(f"{self.folder}: merged changes that were set aside cannot be read: {error}") from None
        return values.to(part.device)


def open_scratch(folder: Path | None, path: Path | None) -> IO[bytes]:
    """Open a file for values that are read back: without a name in a folder, or at a path. Raises OSError."""
    if path is None:
        try:
            return tempfile.TemporaryFile(dir=folder)
        except OSError:  # a file system that removes no name of an open file
            return tempfile.NamedTemporaryFile(dir=folder)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600), "r+b")


def _bytes(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(values.view(-1).view(torch.uint8).numpy().data)
