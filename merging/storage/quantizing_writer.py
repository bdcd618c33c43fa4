"""A writer that encodes merged tensors on their way into the file, in units that wait for all of their elements."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Protocol

from merging.maths.lazy_torch import Tensor, torch
from merging.storage.encodings import Encoding, Loss

__all__ = ["QuantizingWriter"]


class Writer(Protocol):
    """The receiver of the file's tensors."""

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take the elements ``values`` of a tensor, from position ``start`` on."""


@dataclass(slots=True)
class _Unit:
    """The elements of a unit that have arrived, and the number of missing ones."""

    values: Tensor
    missing: int


class QuantizingWriter:
    """Hands tensors on to a writer, those with an encoding as codes and scales.

    It may be called from any thread. A unit waits in memory until all of its elements have arrived, and its bytes do
    not depend on the pieces that they came in.
    """

    def __init__(self, writer: Writer, encodings: Mapping[str, Encoding]) -> None:
        self._writer, self._encodings = writer, encodings
        self._units: dict[tuple[str, int], _Unit] = {}
        self._losses: dict[str, dict[int, Loss]] = {name: {} for name in encodings}
        self._lock = threading.Lock()

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take the elements ``values`` (one axis, contiguous, on the CPU) of a tensor, from position ``start`` on."""
        encoding = self._encodings.get(name)
        if encoding is None:
            self._writer.write(name, values, start)
            return
        position = start
        while position < start + len(values):
            first, last = encoding.unit(position)
            until = min(last, start + len(values))
            piece = values[position - start : until - start]
            whole = piece if len(piece) == last - first else self._collect(name, piece, position, (first, last))
            if whole is not None:
                self._losses[name][first] = encoding.encode(whole, first, self._writer.write)
            position = until

    def _collect(self, name: str, piece: Tensor, position: int, unit: tuple[int, int]) -> Tensor | None:
        """Add elements to their unit, and return all of its elements where these were the last ones."""
        first, last = unit
        key = name, first
        with self._lock:
            waiting = self._units.get(key)
            if waiting is None:
                waiting = self._units[key] = _Unit(torch.empty(last - first, dtype=torch.float32), last - first)
        waiting.values[position - first : position - first + len(piece)] = piece
        with self._lock:
            waiting.missing -= len(piece)
            if waiting.missing:
                return None
            del self._units[key]
        return waiting.values

    def errors(self) -> dict[str, float]:
        """Return the relative error of each encoded tensor: the norm of the difference, by the norm of the tensor."""
        found = {}
        for name, losses in sorted(self._losses.items()):
            error, total = (fsum(loss[each] for loss in losses.values()) for each in (0, 1))
            found[name] = sqrt(error / total) if total else 0.0
        return found
