"""Tensors of GGUF files in the layout of transformers: types, rows of heads, norms and transposes, undone as read."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.stored import Stored

__all__ = ["Converted", "HeadRows", "Transposed", "head_order", "to_head_rows"]

_PIECE = 1 << 17
"""Approximate number of elements that are converted at a time."""


class _Relaid(Derived):
    """A tensor with the values of another, or values made of them one by one."""

    __slots__ = ("_of",)

    def __init__(self, of: Stored, dtype_name: str, shape: tuple[int, ...]) -> None:
        super().__init__(dtype_name, shape, (of,))
        self._of = of

    @property
    def quantized(self) -> str | None:
        return self._of.quantized

    def advise(self, start: int, count: int) -> None:
        self._of.advise(start, count)


class Converted(_Relaid):
    """A tensor in another floating-point type, with a number added to its values in float32."""

    __slots__ = ("_added",)

    def __init__(self, of: Stored, dtype_name: str, added: float = 0.0) -> None:
        super().__init__(of, dtype_name, of.shape)
        self._added = added

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        for first in range(0, len(buffer), _PIECE):
            piece = buffer[first : first + _PIECE]
            raw = torch.empty(len(piece), dtype=self._of.dtype)
            self._of.read_into(raw, start + first)
            piece.copy_(raw.float() + self._added if self._added else raw)


def head_order(rows: int) -> Tensor:
    """Return the row in a GGUF file of each row of a head, as transformers has them.

    transformers rotates the two halves of a head, llama.cpp its neighbouring rows.
    """
    return torch.arange(rows).view(rows // 2, 2).T.reshape(-1)


def to_head_rows(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of queries or keys ``[rows, columns]`` in the order of llama.cpp."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


class HeadRows(_Relaid):
    """Queries or keys of ``heads`` heads, with their rows in the order of transformers."""

    __slots__ = ("_columns", "_rows")

    def __init__(self, of: Stored, heads: int) -> None:
        super().__init__(of, of.dtype_name, of.shape)
        self._rows = of.shape[0] // heads
        self._columns = of.numel // of.shape[0]

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        if not len(buffer):
            return
        size = self._rows * self._columns
        order = head_order(self._rows)
        for head in range(start // size, -(-(start + len(buffer)) // size)):
            raw = torch.empty(size, dtype=self._of.dtype)
            self._of.read_into(raw, head * size)
            turned = raw.view(self._rows, self._columns)[order].view(-1)
            begin, end = max(start, head * size), min(start + len(buffer), (head + 1) * size)
            buffer[begin - start : end - start] = turned[begin - head * size : end - head * size]


class Transposed(_Relaid):
    """The transpose of a matrix, or of each matrix in a stack; a piece needs the whole matrix."""

    __slots__ = ()

    def __init__(self, of: Stored) -> None:
        super().__init__(of, of.dtype_name, (*of.shape[:-2], of.shape[-1], of.shape[-2]))

    def advise(self, start: int, count: int) -> None:
        """Do nothing: a piece is made of the whole matrix."""

    @property
    def scratch(self) -> int:
        return 2 * self._size * self.dtype.itemsize

    @property
    def _size(self) -> int:
        return self.shape[-1] * self.shape[-2]

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        if not len(buffer):
            return
        size = self._size
        for matrix in range(start // size, -(-(start + len(buffer)) // size)):
            raw = torch.empty(size, dtype=self._of.dtype)
            self._of.read_into(raw, matrix * size)
            turned = raw.view(self._of.shape[-2:]).T.reshape(-1)
            begin, end = max(start, matrix * size), min(start + len(buffer), (matrix + 1) * size)
            buffer[begin - start : end - start] = turned[begin - matrix * size : end - matrix * size]
