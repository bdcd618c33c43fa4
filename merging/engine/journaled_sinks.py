"""Sinks whose values a journal records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from merging.engine.outputs import Sink
from merging.maths.lazy_torch import Tensor

__all__ = ["CountingSink", "EncodingSink", "JournaledSink"]


class JournaledSink(Sink, Protocol):
    """A sink whose values stay when the process is killed.

    Attributes:
        resumed: whether the values of a former run are there.
    """

    @property
    def resumed(self) -> bool: ...

    def credit(self, written: Mapping[str, int]) -> None:
        """Count bytes of tensors as written."""

    def sync(self) -> None:
        """Make everything that was written durable. Raises OSError."""


@runtime_checkable
class EncodingSink(JournaledSink, Protocol):
    """A journaled sink that encodes tensors: each is only written when all of its values are there.

    Attributes:
        sizes: the bytes of the values of each tensor that is encoded.
    """

    sizes: dict[str, int]

    def error_of(self, name: str) -> float:
        """Return the error of a tensor whose values are all there."""

    def restore_error(self, name: str, error: float) -> None:
        """Take over the error of a tensor that a former run encoded."""


class CountingSink:
    """Hands values on to a sink, and counts the bytes of each tensor until they are taken."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._written: Counter[str] = Counter()

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Hand values on."""
        self.sink.write(name, values, start)
        self._written[name] += values.nbytes

    def take(self) -> Counter[str]:
        """Return the bytes written since the last call, by tensor."""
        written, self._written = self._written, Counter()
        return written
