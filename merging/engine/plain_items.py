"""Items whose tensors compiled kernels take as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merging.maths.kernels.steps import has_extremes, write_changes
from merging.maths.kernels.switch import kernel_types, usable
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.stored_values import StoredValues
from merging.plan.items import Item
from merging.sources.stored import Stored

__all__ = ["PlainTile", "read_plain"]

MakeBuffer = Callable[[str, int, Any], Tensor]
"""Returns a buffer of a name, a number of elements and a type, which is valid until the next tile."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainTile:
    """A tile in the type of its files: the models' values ``[n, size]``, and the base's ``[size]``, if it has one."""

    item: Item
    values: Tensor
    base: Tensor | None
    buffer: MakeBuffer

    def changes(self, subtract: bool) -> StoredValues:
        """Return the values, minus the base's with ``subtract``; they are written out when they are asked for."""
        values, base = self.values, self.base if subtract else None
        shape = tuple(values[0].view(self.item.cut.shape(self.item.site)).shape)

        def decode() -> Tensor:
            into = self.buffer("stack", values.numel(), self.item.dtype).view_as(values)
            return write_changes(values, base, into).view(len(values), *shape)

        return StoredValues(values, base, shape, decode)


def read_plain(item: Item, size: int, buffer: MakeBuffer, read: Callable[[Tensor, Stored], None]) -> PlainTile | None:
    """Read a tile as it is stored; None where torch must look at its numbers, or kernels cannot merge them.

    Args:
        item: the item.
        size: the elements of the tile.
        buffer: returns a buffer.
        read: fills a buffer with the tile of a stored tensor.
    """
    dtype = _plain_dtype(item)
    if dtype is None:
        return None
    values = buffer("stored", len(item.inputs) * size, dtype).view(len(item.inputs), size)
    base = buffer("stored base", size, dtype) if item.base is not None else None
    for row, each in zip([base, *values], [item.base, *item.inputs], strict=True):
        if isinstance(each, Stored) and row is not None:
            read(row, each)
        elif row is not None:
            row.copy_(base) if base is not None else row.zero_()
    return None if has_extremes(values, base) else PlainTile(item, values, base, buffer)


def _plain_dtype(item: Item) -> torch.dtype | None:
    """Return the one type of an item's stored tensors, if kernels can merge them as they are stored.

    Adapters, several types, scaled changes, and merges in float64 are computed by torch.
    """
    if not usable() or item.dtype != torch.float32 or not item.numel:
        return None
    stored = [each for each in (*item.inputs, item.base) if each is not None]
    types = {each.dtype if isinstance(each, Stored) else None for each in stored}
    scaled = any(item.scale(slot) != 1 for slot in range(len(item.inputs)))
    dtype = types.pop() if len(types) == 1 else None
    return dtype if dtype in kernel_types() and not scaled else None
