"""Tensors of a merge that another merge reads, without a file in between: their values are there while both run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from merging.maths.lazy_torch import Tensor
from merging.sources.stored import Stored

__all__ = ["Deferred", "StageValues", "ValuesReader"]


class ValuesReader(Protocol):
    """Reads values of tensors by their names."""

    def read(self, name: str, buffer: Tensor, start: int) -> None:
        """Fill a buffer with the elements of a tensor from ``start`` on."""

    def advise(self, name: str, start: int, count: int) -> None:
        """Announce that these elements are needed soon."""


@dataclass(slots=True, eq=False)
class StageValues:
    """The values of the tensors of one merge: ``reader`` reads them while it is there, and is None otherwise.

    ``identity`` is a text that identifies them before they are there.
    """

    identity: str
    reader: ValuesReader | None = field(default=None)


class Deferred(Stored):
    """A tensor that a merge computes.

    ``inputs`` are the tensors that it is computed from, and ``scratch`` the bytes of memory that any piece takes.
    """

    __slots__ = ("_inputs", "_name", "_scratch", "_values")

    def __init__(
        self,
        values: StageValues,
        name: str,
        dtype_name: str,
        shape: tuple[int, ...],
        *,
        inputs: tuple[Stored, ...],
        scratch: int,
    ) -> None:
        super().__init__(dtype_name, shape)
        self._values, self._name, self._inputs, self._scratch = values, name, inputs, scratch

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        assert self._values.reader is not None, f"{self._name} is read before it is merged"
        if len(buffer):
            self._values.reader.read(self._name, buffer, start)

    def advise(self, start: int, count: int) -> None:
        if self._values.reader is not None:
            self._values.reader.advise(self._name, start, count)

    @property
    def readable(self) -> bool:
        return self._values.reader is not None

    @property
    def at_hand(self) -> bool:
        return self.readable and all(each.at_hand for each in self._inputs)

    def source(self) -> str:
        return self._values.identity

    @property
    def made_of(self) -> tuple[Stored, ...]:
        return tuple(inner for each in self._inputs for inner in each.made_of)

    @property
    def scratch(self) -> int:
        return self._scratch

    def order(self) -> tuple[str, int]:
        return min((each.order() for each in self._inputs), default=(self._values.identity, 0))
