"""Token tables that adapters hold in full, which may have more rows than the base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from merging.maths.lazy_torch import Tensor, torch
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change, LoraChange, Replacement
from merging.sources.derived import Derived
from merging.sources.stored import Stored
from merging.sources.tied_weights import embeddings_among, is_head, is_table
from merging.sources.token_rows import TokenRows

__all__ = ["replace_tables", "tables_as_checkpoint"]


class _Adapted(Derived):
    """A table that was saved along with factors on it, as both make it: ``layer + scale * up @ down``, row by row."""

    __slots__ = ("_change", "_layer")

    def __init__(self, layer: Stored, change: LoraChange) -> None:
        super().__init__("F32", layer.shape, (layer, change.down, change.up))
        self._layer, self._change = layer, change

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        width, stop = self.shape[1], start + len(buffer)
        first, last = start // width, -(-stop // width)
        layer = torch.empty((last - first) * width, dtype=self._layer.dtype)
        self._layer.read_into(layer, first * width)
        up, down = self._change.up, self._change.down
        if self._change.transposed:
            change = _columns(down, first, last) @ up.read().float().mT
        else:
            change = _rows(up, first, last) @ down.read().float()
        values = layer.float().view(-1, width) + change * self._change.scale
        buffer.copy_(values.view(-1)[start - first * width : stop - first * width])


class _WithRows(Derived):
    """A table that was saved along with trained rows, which take the place of its own."""

    __slots__ = ("_layer", "_trained")

    def __init__(self, layer: Stored, trained: TokenRows) -> None:
        super().__init__("F32", layer.shape, (layer, trained.value))
        self._layer, self._trained = layer, trained

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        width, stop = self.shape[1], start + len(buffer)
        first, last = start // width, -(-stop // width)
        values = _rows(self._layer, first, last)
        for place, index in enumerate(self._trained.indices):
            if first <= index < last:
                values[index - first] = _rows(self._trained.value, place, place + 1)[0]
        buffer.copy_(values.view(-1)[start - first * width : stop - first * width])


def _rows(stored: Stored, first: int, last: int) -> Tensor:
    values = torch.empty((last - first) * stored.shape[1], dtype=stored.dtype)
    stored.read_into(values, first * stored.shape[1])
    return values.float().view(last - first, -1)


def _columns(stored: Stored, first: int, last: int) -> Tensor:
    """Return some columns of a stored matrix, as rows."""
    values = torch.empty(stored.shape[0], last - first, dtype=stored.dtype)
    for row, into in enumerate(values):
        stored.read_into(into, row * stored.shape[1] + first)
    return values.float().mT


def tables_as_checkpoint(adapter: Adapter, reference: Checkpoint) -> Checkpoint | None:
    """Return the tables that an adapter holds in full, under the names of ``reference``; None without any."""
    tables = {
        name: table
        for target, change in adapter.changes.items()
        if (table := _table_of(change)) is not None and (name := _find_name(target, reference)) is not None
    }
    folder = adapter.path if adapter.path.is_dir() else None
    return Checkpoint(adapter.path, tables, adapter.files, folder=folder, origin=adapter.origin) if tables else None


def replace_tables(adapter: Adapter, tables: Mapping[str, Stored], reference: Checkpoint) -> Adapter:
    """Return the adapter with its tables replaced by these, which have the names of ``reference``."""
    changes = dict(adapter.changes)
    for target, change in adapter.changes.items():
        name = _find_name(target, reference) or ""
        table, of_base = tables.get(name), reference.lookup(name)
        if table is None or (of_base is not None and change.shape == table.shape == of_base.shape):
            continue  # what it is already, and low rank perhaps
        reason = "its table has other rows than the base's"
        changes[target] = Replacement(target, "full", value=table, needs_base=reason)
    return replace(adapter, changes=changes)


def _table_of(change: Change) -> Stored | None:
    if not is_table(change.target):
        return None
    if isinstance(change, Replacement):
        return change.value
    if isinstance(change, TokenRows):
        return _WithRows(change.layer, change) if change.layer else None
    if not isinstance(change, LoraChange) or change.layer is None or change.needs_base:
        return None
    return _Adapted(change.layer, change)


def _find_name(target: str, reference: Checkpoint) -> str | None:
    """Return the reference's name of an adapter's table; it may have a prefix more or less."""
    if reference.lookup(target) is not None or not is_table(target):
        return target if is_table(target) else None
    same = [name for name in reference.tensors if is_head(name)] if is_head(target) else None
    found = embeddings_among(reference.tensors) if same is None else same
    return found[0] if len(found) == 1 else None
