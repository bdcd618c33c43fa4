"""Merged changes set aside until the factor that scales them is known."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from merging.errors import OutputError
from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.os_calls import read_at, sync, write_at
from merging.storage.scratch import open_scratch

__all__ = ["Spool"]


@dataclass(frozen=True, slots=True)
class _Part:
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def plain(self) -> list[Any]:
        """Return the part in plain values."""
        return [self.offset, list(self.shape), str(self.dtype).removeprefix("torch.")]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> _Part:
        """Return a part from its plain values."""
        offset, shape, dtype = plain
        return cls(offset, torch.Size(shape), getattr(torch, dtype))


@dataclass(frozen=True, slots=True)
class _Kept:
    """A change that was kept: the name of its file, and its parts; for factors also its shape and their order."""

    file: str
    parts: tuple[_Part, ...]
    factors: tuple[tuple[int, ...], bool] | None

    def plain(self) -> dict[str, Any]:
        """Return it in plain values."""
        return {"file": self.file, "parts": [part.plain() for part in self.parts], "factors": self.factors}


class Spool:
    """Keeps changes, factors as factors, in a file without a name: it is gone when the program ends, in any way.

    ``folder`` is the place of the file. With a ``path`` in it the file has a name, and a later run can read the changes
    whose places it knows. Several threads may use a spool at once. A copy in another process, by pickling, writes to a
    file of its own in the same folder, and reads the files of all others. Raises
    :class:`~merging.errors.OutputError` when the disk is full.
    """

    def __init__(self, folder: Path | None, path: Path | None = None) -> None:
        self.folder = folder
        self.path = path
        self._files: dict[str, IO[bytes]] = {}
        self._end = 0
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._new: set[str] = set()
        self._others: set[str] = set()
        """Files of other processes with changes that may not be durable."""

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.folder is not None and self.path is not None, "a file without a name has no other reader"
        return _open_elsewhere, (self.folder.absolute(), self.path.stem, dict(self._kept))

    def put(self, name: str, delta: Delta) -> None:
        """Keep a change."""
        parts = (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.value,)
        factors = (delta.shape, delta.transposed) if isinstance(delta, LowRank) else None
        self._kept[name] = _Kept(self._own, tuple(self._write(part) for part in parts), factors)
        self._new.add(name)

    def take(self, name: str) -> Delta | None:
        """Return the change that was kept under a name, if any, on the CPU."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        values = [self._read(kept.file, part) for part in kept.parts]
        return Dense(values[0]) if kept.factors is None else LowRank(values[0], values[1], *kept.factors)

    def places(self) -> dict[str, Any]:
        """Return the places of the changes that were kept, in plain values."""
        return {name: kept.plain() for name, kept in [*self._kept.items()]}

    def take_new(self) -> dict[str, Any]:
        """Return the places of the changes that were kept since the last call, in plain values."""
        new, self._new = self._new, set()
        return {name: self._kept[name].plain() for name in new}

    def restore(self, places: Mapping[str, Any], written: bool = False) -> None:
        """Know the changes at these places, in the file from before or in files of other processes.

        ``written`` says whether other processes wrote them just now, so that :meth:`sync` makes them durable too.
        """
        for name, place in places.items():
            parts = tuple(_Part.of(part) for part in place["parts"])
            factors = place["factors"]
            file = place.get("file", self._own)
            self._kept[name] = _Kept(file, parts, None if factors is None else (tuple(factors[0]), factors[1]))
            if file == self._own:
                self._end = max([self._end, *(part.offset + prod(part.shape) * part.dtype.itemsize for part in parts)])
            elif written:
                with self._lock:
                    self._others.add(file)

    def sync(self) -> None:
        """Make the changes that were kept durable. Raises OSError."""
        with self._lock:
            others, self._others = self._others, set()
            own = self._files.get(self._own)
        for file in ([] if own is None else [own]) + [self._open(name) for name in sorted(others)]:
            sync(file.fileno())

    def close(self) -> None:
        """Free the space of a file without a name. Files with a name are opened again when they are needed."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    @property
    def _own(self) -> str:
        """The name of the file that this process writes to; empty for a file without a name."""
        return "" if self.path is None else self.path.name

    def _write(self, values: Tensor) -> _Part:
        host = values.detach().contiguous().cpu()
        try:
            file = self._open(self._own)
            with self._lock:
                offset, self._end = self._end, self._end + host.nbytes
            write_at(file.fileno(), _bytes(host), offset)
        except OSError as error:
            raise OutputError(
                f"{self.folder or tempfile.gettempdir()}: merged changes cannot be set aside: {error.strerror}"
            ) from None
        return _Part(offset, values.shape, values.dtype)

    def _open(self, name: str) -> IO[bytes]:
        with self._lock:
            if name not in self._files:
                path = self.path.with_name(name) if self.path is not None else None
                self._files[name] = open_scratch(self.folder, path)
            return self._files[name]

    def _read(self, file: str, part: _Part) -> Tensor:
        values = torch.empty(part.shape, dtype=part.dtype)
        try:
            read_at(self._open(file).fileno(), _bytes(values), part.offset)
        except (OSError, EOFError) as error:
            raise OutputError(f"{self.folder}: merged changes that were set aside cannot be read: {error}") from None
        return values


def _open_elsewhere(folder: Path, stem: str, kept: dict[str, _Kept]) -> Spool:
    """Return the copy of a spool in another process."""
    spool = Spool(folder, folder / f"{stem.partition('-')[0]}-{uuid4().hex}.spool")
    spool._kept = kept
    return spool


def _bytes(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(values.view(-1).view(torch.uint8).numpy().data)
