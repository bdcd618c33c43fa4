"""Merged changes set aside until the factor that scales them is known."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from merging.errors import OutputError
from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.os_calls import read_at, write_at

__all__ = ["Spool"]


@dataclass(frozen=True, slots=True)
class _Part:
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Spool:
    """Keeps changes, factors as factors, in a file without a name: it is gone when the program ends, in any way.

    ``folder`` is the place of the file. Several threads may use a spool at once. Raises
    :class:`~merging.errors.OutputError` when the disk is full.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
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

    def close(self) -> None:
        """Free the space."""
        if self._file is not None:
            self._file.close()

    def _write(self, values: Tensor) -> _Part:
        host = values.detach().contiguous().cpu()
        try:
            with self._lock:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (closed by close)
                offset, self._end = self._end, self._end + host.nbytes
            write_at(self._file.fileno(), _bytes(host), offset)
        except OSError as error:
            raise OutputError(
                f"{self.folder or tempfile.gettempdir()}: merged changes cannot be set aside: {error.strerror}"
            ) from None
        return _Part(offset, values.shape, values.dtype, values.device)

    def _read(self, part: _Part) -> Tensor:
        assert self._file is not None
        values = torch.empty(part.shape, dtype=part.dtype)
        try:
            read_at(self._file.fileno(), _bytes(values), part.offset)
        except (OSError, EOFError) as error:
            raise OutputError(f"{self.folder}: merged changes that were set aside cannot be read: {error}") from None
        return values.to(part.device)


def _bytes(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(values.view(-1).view(torch.uint8).numpy().data)
