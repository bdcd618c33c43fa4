"""Tensors that are computed from stored tensors when they are read."""

from __future__ import annotations

from merging.sources.stored import Stored

__all__ = ["Derived"]


class Derived(Stored):
    """A tensor computed from others. It takes the first one's place in the order of reading."""

    __slots__ = ("_made_of",)

    def __init__(self, dtype_name: str, shape: tuple[int, ...], made_of: tuple[Stored, ...]) -> None:
        super().__init__(dtype_name, shape)
        self._made_of = made_of

    @property
    def made_of(self) -> tuple[Stored, ...]:
        return tuple(inner for each in self._made_of for inner in each.made_of)

    @property
    def quantized(self) -> str | None:
        return self.made_of[0].dtype_name

    @property
    def at_hand(self) -> bool:
        return all(each.at_hand for each in self._made_of)

    @property
    def readable(self) -> bool:
        return all(each.readable for each in self._made_of)

    def source(self) -> str:
        return "+".join(sorted({each.source() for each in self._made_of}))

    def order(self) -> tuple[str, int]:
        return self._made_of[0].order()

    def advise(self, start: int, count: int) -> None:
        """Do nothing: in general, a piece of it is not a contiguous part of a file."""
