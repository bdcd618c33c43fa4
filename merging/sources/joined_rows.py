"""Tensors that consist of ranges of rows of other tensors, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from merging.maths.lazy_torch import Tensor
from merging.sources.derived import Derived
from merging.sources.stored import Stored

__all__ = ["JoinedRows"]


class JoinedRows(Derived):
    """Rows of several tensors, which have one type and rows of one shape. Values stay as they are stored."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Stored]) -> None:
        rows = sum(part.shape[0] for part in parts)
        super().__init__(parts[0].dtype_name, (rows, *parts[0].shape[1:]), tuple(parts))
        self._parts = tuple(parts)

    @property
    def quantized(self) -> str | None:
        return self._parts[0].quantized

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        done = 0
        for part in self._parts:
            count = min(part.numel - start, len(buffer) - done)
            if count > 0:
                part.read_into(buffer[done : done + count], start)
                done += count
            start = max(0, start - part.numel)
