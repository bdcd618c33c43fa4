"""The models' changes of every tensor, read once and kept as far as the memory allows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from merging.engine.in_memory import TensorInputs
from merging.engine.process_memory import available_memory
from merging.engine.tiles import Tiler
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.plan.cuts import Cut
from merging.plan.items import Item
from merging.plan.merge_plan import Plan
from merging.sources.changes import Change
from merging.sources.dtypes import DTYPES

__all__ = ["ChangeStore", "ModelReader", "Room"]

_SHARE = 0.5
"""The share of the available memory that changes and merges may take."""


class Room:
    """The bytes that may still be kept; everything fits where no system says how much memory there is."""

    def __init__(self, nbytes: int | None = None) -> None:
        available = available_memory()
        self.left = nbytes if nbytes is not None else int(available * _SHARE) if available is not None else 1 << 62

    def take(self, nbytes: int) -> bool:
        """Take some bytes, and return whether there was room for them."""
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True


class ModelReader:
    """Reads the inputs of a plan's tensors: low-rank changes as factors, all others in full.

    Attributes:
        plan: the plan, whose models are read.
        sites: the site of each tensor that is merged, by name.
        dtypes: the type of each tensor in the output.
        unchanged: the tensors that were read so far and that no model changes.
    """

    def __init__(self, plan: Plan, device: torch.device, room: Room) -> None:
        self.plan = plan
        self._items = {item.site.name: item for item in plan.items if item.form != "copy"}
        self._tiler, self._room = Tiler(plan, device), room
        self._kept: dict[str, TensorInputs] = {}
        self.unchanged: set[str] = set()
        self.sites: dict[str, Site] = {name: item.site for name, item in self._items.items()}
        self.dtypes: dict[str, torch.dtype] = {
            name: DTYPES[item.outs[0].dtype_name] for name, item in self._items.items()
        }

    def read(self, name: str) -> TensorInputs:
        """Return the changes (or weights) of a tensor by model, and the base's values."""
        if name not in self._kept:
            inputs = self._read(self._items[name])
            if not self.plan.weights and not any(bool(each.any()) for each in map(_last_part, inputs.stack.deltas)):
                self.unchanged.add(name)
            if not self._room.take(_nbytes(inputs)):
                return inputs
            self._kept[name] = inputs
        return self._kept[name]

    def select(self, name: str, models: Sequence[int], *, factors: bool) -> TensorInputs:
        """Return the inputs of some of the models, in full unless ``factors`` are wanted."""
        stack, base = self.read(name)
        deltas: list[Delta] = [stack.deltas[slot] for slot in models]
        if not factors and stack.low_rank:
            deltas = [Dense(delta.dense()) for delta in deltas]
        keys = [stack.models[slot] for slot in models]
        return TensorInputs(Stack(deltas, keys, [stack.present[slot] for slot in models]), base)

    def _read(self, item: Item) -> TensorInputs:
        changes = [each for each in item.inputs if each is not None]
        low_rank = bool(changes) and all(isinstance(each, Change) and each.low_rank for each in changes)
        if low_rank and not self.plan.weights:
            base = item.base.read().to(self._tiler.device, item.dtype) if item.base is not None else None
            return TensorInputs(self._tiler.stack(item), base)
        whole = replace(item, cut=Cut("whole", max(1, prod(item.site.shape))))
        (tile,) = self._tiler.tiles(whole, 0, max(1, item.numel))
        deltas = [Dense(value.clone()) for value in tile.stack.dense()]  # the tile's buffers are used again
        base = None if tile.base is None else tile.base.reshape(item.site.shape).clone()
        return TensorInputs(Stack(deltas, tile.stack.models, tile.stack.present), base)


class ChangeStore:
    """Merged changes of the last candidates by key, as many as there is room for: a new scale merges nothing again."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._kept: OrderedDict[str, tuple[int, dict[str, Delta]]] = OrderedDict()

    def get(self, key: str) -> Mapping[str, Delta] | None:
        """Return the changes of a key, None if they are not kept."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def put(self, key: str, changes: dict[str, Delta]) -> None:
        """Keep changes; those that were not asked for longest make room."""
        size = sum(_size(part) for delta in changes.values() for part in _parts(delta))
        while not self._room.take(size):
            if not self._kept:
                return
            _, (freed, _) = self._kept.popitem(last=False)
            self._room.left += freed
        self._kept[key] = size, changes


def _parts(delta: Delta) -> Iterable[Tensor]:
    return (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.value,)


def _last_part(delta: Delta) -> Tensor:
    """Return a part of a change that is zero where the change is zero for sure."""
    return delta.up if isinstance(delta, LowRank) else delta.value


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _nbytes(inputs: TensorInputs) -> int:
    parts = [part for delta in inputs.stack.deltas for part in _parts(delta)]
    return sum(map(_size, [*parts, *([] if inputs.base is None else [inputs.base])]))
