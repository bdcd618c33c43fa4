"""Trained rows of an embedding table or an output head: vectors of a few tokens, which replace the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from merging.maths.delta import Delta, Dense
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.changes import Change
from merging.sources.stored import Stored

__all__ = ["TokenRows", "TokenTable"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows(Change):
    """Rows ``value [n, width]`` that replace the rows ``indices`` of a table; all other rows stay unchanged.

    ``layer`` is the base's own table if the adapter saved it too, as PEFT does for tables that have grown.
    """

    value: Stored
    indices: tuple[int, ...]
    layer: Stored | None = None

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return (self.value,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape if self.layer else (max(self.indices) + 1, self.value.shape[1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] == self.value.shape[1] and max(self.indices) < shape[0]

    def among(self, indices: Sequence[int]) -> TokenRows:
        """Return the same change for a table that holds only these rows."""
        place = {index: position for position, index in enumerate(indices)}
        layer = TokenTable(self.layer, indices) if self.layer else None
        return replace(self, indices=tuple(place[index] for index in self.indices), layer=layer)

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        change = torch.zeros(shape, dtype=dtype)
        indices = list(self.indices)
        change[indices] = self.value.read().to(dtype) - base()[indices]
        return Dense(change)


class TokenTable(Stored):
    """Some rows of a stored table, read one by one."""

    __slots__ = ("_of", "indices")

    def __init__(self, of: Stored, indices: Sequence[int]) -> None:
        super().__init__(of.dtype_name, (len(indices), of.shape[1]))
        self._of = of
        self.indices = tuple(indices)

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        width = self.shape[1]
        rows = range(start // width, -(-(start + len(buffer)) // width))
        table = torch.empty(len(rows), width, dtype=self.dtype)
        for row, values in zip(rows, table, strict=True):
            self._of.read_into(values, self.indices[row] * width)
        first = start - rows.start * width
        buffer.copy_(table.view(-1)[first : first + len(buffer)])

    def advise(self, start: int, count: int) -> None:
        """Do nothing: the rows are far apart."""

    @property
    def at_hand(self) -> bool:
        return self._of.at_hand

    def source(self) -> str:
        return self._of.source()

    @property
    def made_of(self) -> tuple[Stored, ...]:
        return self._of.made_of

    def order(self) -> tuple[str, int]:
        return self._of.order()
