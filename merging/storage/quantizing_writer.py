"""A writer that encodes merged tensors on their way into the file, in units that wait for all of their elements."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, prod, sqrt
from typing import Any, Protocol

from merging.maths.lazy_torch import Tensor, torch
from merging.storage.encodings import Encoding, Loss

__all__ = ["QuantizingWriter", "ResumableQuantizingWriter"]


class Writer(Protocol):
    """The receiver of the file's tensors."""

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take the elements ``values`` of a tensor, from position ``start`` on."""


class ResumableWriter(Writer, Protocol):
    """A writer whose files may have values of a former run (``resumed``)."""

    @property
    def resumed(self) -> bool: ...

    def credit(self, written: Mapping[str, int]) -> None:
        """Count bytes of tensors as written."""

    def sync(self) -> None:
        """Make everything that was written durable."""


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
        self.writer, self._encodings = writer, encodings
        self._units: dict[tuple[str, int], _Unit] = {}
        self._losses: dict[str, dict[int, Loss]] = {name: {} for name in encodings}
        self._lock = threading.Lock()

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take the elements ``values`` (one axis, contiguous, on the CPU) of a tensor, from position ``start`` on."""
        encoding = self._encodings.get(name)
        if encoding is None:
            self.writer.write(name, values, start)
            return
        position = start
        while position < start + len(values):
            first, last = encoding.unit(position)
            until = min(last, start + len(values))
            piece = values[position - start : until - start]
            whole = piece if len(piece) == last - first else self._collect(name, piece, position, (first, last))
            if whole is not None:
                self._losses[name][first] = encoding.encode(whole, first, self.writer.write)
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

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizingWriter, (self.writer, self._encodings)

    def take_losses(self) -> dict[str, dict[int, Loss]]:
        """Return the losses since the last call, by tensor and the first element of a unit."""
        losses, self._losses = self._losses, {name: {} for name in self._encodings}
        return losses

    def add_losses(self, losses: Mapping[str, Mapping[int, Loss]]) -> None:
        """Add the losses of units that another process encoded."""
        for name, each in losses.items():
            self._losses[name].update(each)

    def error_of(self, name: str) -> float:
        """Return the relative error of an encoded tensor: the norm of the difference, by the norm of the tensor."""
        error, total = (fsum(loss[each] for loss in self._losses[name].values()) for each in (0, 1))
        return sqrt(error / total) if total else 0.0

    def errors(self) -> dict[str, float]:
        """Return the relative errors of all encoded tensors."""
        return {name: self.error_of(name) for name in sorted(self._losses)}


class ResumableQuantizingWriter(QuantizingWriter):
    """A writer that goes on with the encoded tensors of a former run.

    Attributes:
        sizes: the bytes of the merged values of each encoded tensor, which is written when all of them have arrived.
    """

    def __init__(self, writer: ResumableWriter, encodings: Mapping[str, Encoding]) -> None:
        super().__init__(writer, encodings)
        self._files = writer
        self.sizes = {name: 4 * prod(encoding.shape) for name, encoding in encodings.items()}
        self._former_errors: dict[str, float] = {}

    @property
    def resumed(self) -> bool:
        """Whether the values of a former run are there."""
        return self._files.resumed

    def credit(self, written: Mapping[str, int]) -> None:
        """Count bytes of tensors as written; of an encoded tensor all of them."""
        for name, count in written.items():
            encoding = self._encodings.get(name)
            self._files.credit({name: count} if encoding is None else {out.name: out.nbytes for out in encoding.outs})

    def sync(self) -> None:
        """Make everything that was written durable."""
        self._files.sync()

    def restore_error(self, name: str, error: float) -> None:
        """Take over the relative error of a tensor that a former run encoded."""
        self._former_errors[name] = error

    def error_of(self, name: str) -> float:
        """Return the relative error of an encoded tensor, of this run or a former one."""
        return self._former_errors[name] if name in self._former_errors else super().error_of(name)
