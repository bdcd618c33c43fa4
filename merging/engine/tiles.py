"""Cutting a tensor of the merge into tiles: what each model brings to a piece of it, side by side and in one type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod

import torch
from torch import Tensor

from merging.errors import InputError
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.methods.contract.method import Grain
from merging.plan.items import TILE, Item, Plan
from merging.sources.adapter import Change, LoraChange
from merging.sources.computed import ComputedChange
from merging.sources.stored import Stored

__all__ = ["GPU_TILE", "Tile", "Tiler", "row_step", "whole_rows"]

GPU_TILE = 1 << 24
"""Elements of one model merged at a time on a GPU, which wants few large kernels."""


@dataclass(slots=True)
class Tile:
    """A piece of a tensor: its flat offset, what the models bring, and the base's values if they are wanted.

    The tensors lie in the tiler's buffers: they hold until the next tile.
    """

    start: int
    stack: Stack
    base: Tensor | None


class Tiler:
    """Reads pieces of the plan's items into buffers of its own, on one device; belongs to one worker.

    Raises :class:`~merging.errors.InputError` for values that are not finite, unless the recipe allows them.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self._buffers: dict[object, Tensor] = {}

    def tile_size(self, item: Item) -> int:
        """Elements in one tile of an item that lies in full."""
        grain = self.plan.recipe.method.grain_at(item.site)
        if grain == "matrix":
            return max(1, item.numel)
        return whole_rows(item, grain, TILE if self.device.type == "cpu" else GPU_TILE)

    def tiles(self, item: Item, start: int, stop: int) -> Iterator[Tile]:
        """The tiles of an item from one flat offset to another."""
        return self._flat(item, start, stop) if item.by_chunks else self._by_rows(item)

    def _flat(self, item: Item, start: int, stop: int) -> Iterator[Tile]:
        dtype, count = self.plan.dtype(item), len(item.inputs)
        present = tuple(each is not None for each in item.inputs)
        step = self.tile_size(item)
        shapes = {"element": (-1,), "row": (-1, item.site.row), "matrix": item.site.shape}
        shape = shapes[self.plan.recipe.method.grain_at(item.site)]
        for position in range(start, stop, step):
            size = min(step, stop - position)
            base = self._read("base", item.base, position, size, dtype) if item.base is not None else None
            values = self._buffer("stack", count * size, dtype).view(count, size)
            for slot, stored in enumerate(item.inputs):
                assert stored is None or isinstance(stored, Stored)
                self._bring(values[slot], stored, position, base)
            if not self.plan.recipe.allow_nonfinite:
                self._check(item, values, base)
            values, base = values.view(count, *shape), base.view(shape) if base is not None else None
            yield Tile(position, Stack.of(values, self.plan.keys, present), base)

    def _bring(self, into: Tensor, stored: Stored | None, start: int, base: Tensor | None) -> None:
        """One model's values at a piece, or their change from the base; an absent model changes nothing."""
        if stored is not None:
            into.copy_(self.raw(stored, start, len(into)))
            if not self.plan.weights and base is not None:
                into.sub_(base)
        elif self.plan.weights and base is not None:
            into.copy_(base)
        else:
            into.zero_()

    def raw(self, stored: Stored, start: int, size: int) -> Tensor:
        """Elements of a stored tensor as they are, on the device; valid until the next call."""
        buffer = self._buffer("raw", size, stored.dtype, host=True)
        if self.device.type != "cpu":
            self.wait()  # the previous copy out of this buffer may still be under way
        stored.read_into(buffer, start)
        return buffer.to(self.device, non_blocking=True)

    def _read(self, slot: str, stored: Stored, start: int, size: int, dtype: torch.dtype) -> Tensor:
        return self._buffer(slot, size, dtype).copy_(self.raw(stored, start, size))

    def _by_rows(self, item: Item) -> Iterator[Tile]:
        """Tiles of whole rows, for items whose inputs are partly factors or computed changes."""
        dtype, shape = self.plan.dtype(item), item.site.shape or (1,)
        columns = prod(shape[1:])
        present = tuple(each is not None for each in item.inputs)
        loaded = {slot: self.change(item, slot) for slot, each in enumerate(item.inputs) if isinstance(each, Change)}
        if not item.site.shape:
            loaded = {slot: Dense(delta.dense().view(1)) for slot, delta in loaded.items()}
        grain = self.plan.recipe.method.grain_at(item.site)
        whole = grain == "matrix" or (grain == "row" and item.site.kind == "vector")
        step = max(1, shape[0]) if whole else row_step(columns, self.device, item.site.kind == "experts")
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            start, block = first * columns, (last - first, *shape[1:])
            size = prod(block)
            base = self._read("base", item.base, start, size, dtype).view(block) if item.base is not None else None
            values = self._buffer("stack", len(present) * size, dtype).view(len(present), *block)
            for slot, each in enumerate(item.inputs):
                if slot in loaded:
                    values[slot].copy_(loaded[slot].rows(first, last).dense())
                    if self.plan.weights and base is not None:
                        values[slot].add_(base)
                else:
                    assert each is None or isinstance(each, Stored)
                    self._bring(values[slot].view(-1), each, start, base.view(-1) if base is not None else None)
            if not self.plan.recipe.allow_nonfinite:
                self._check(item, values, base)
            yield Tile(start, Stack.of(values, self.plan.keys, present), base)

    def stack(self, item: Item) -> Stack:
        """All changes of an item that is merged factor by factor; an absent model is a zero of rank 0."""
        found = [self.change(item, slot) if each is not None else None for slot, each in enumerate(item.inputs)]
        like = next(delta for delta in found if isinstance(delta, LowRank))
        deltas = [
            delta.oriented(like.transposed) if isinstance(delta, LowRank) else LowRank.zero(like) for delta in found
        ]
        return Stack(deltas, self.plan.keys, [delta is not None for delta in found])

    def change(self, item: Item, slot: int) -> Delta:
        """What one adapter changes in an item, whole, on the device."""
        change, dtype = item.inputs[slot], self.plan.dtype(item)
        assert isinstance(change, Change)

        def base() -> Tensor:
            if item.base is None:
                raise InputError(f"{self.plan.models[slot].path}: {change.target}: {change.needs_base}: give --base")
            return item.base.read().to(dtype)

        self._check_layer(item, slot)
        delta = change.read(item.site.shape, base, dtype)
        parts = (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.value,)
        if not self.plan.recipe.allow_nonfinite and not all(bool(part.isfinite().all()) for part in parts):
            raise self._not_finite(self.plan.models[slot].path, change.target)
        return delta.to(self.device)

    def _check_layer(self, item: Item, slot: int) -> None:
        """Refuse factors whose own copy of the base's layer is another one: they belong on top of that copy."""
        change = item.inputs[slot]
        if not isinstance(change, (LoraChange, ComputedChange)) or change.layer is None or item.base is None:
            return
        if isinstance(change, LoraChange) and change.start:
            return
        for start in range(0, item.numel, TILE):
            size = min(TILE, item.numel - start)
            ours = self._read("base", item.base, start, size, torch.float32)
            # it may have been rounded to the precision of the training
            if not torch.allclose(self.raw(change.layer, start, size).float(), ours, rtol=2**-7, atol=1e-6):
                raise InputError(
                    f"{self.plan.models[slot].path}: {change.target}: the layer saved along with its factors is not "
                    f"the base's: was it trained, or its vocabulary changed? Give the base that it belongs to"
                )

    def _check(self, item: Item, values: Tensor, base: Tensor | None) -> None:
        # One sum per tile tells whether all is finite; only a sum that is not is looked into.
        finite = isfinite(float(values.sum()))
        if finite and not self.plan.weights:
            return  # a change from a base that is not finite is not finite either
        if base is not None and not isfinite(float(base.sum())) and not bool(base.isfinite().all()):
            path = self.plan.base.path if self.plan.base is not None else "the base"
            raise self._not_finite(path, item.site.name)
        if not finite:
            for slot, value in enumerate(values):
                if not bool(value.isfinite().all()):
                    raise self._not_finite(self.plan.models[slot].path, item.site.name)

    @staticmethod
    def _not_finite(path: object, name: str) -> InputError:
        return InputError(
            f"{path}: {name} holds NaN or infinite values, which would spread over the merge: repair or leave out this "
            f"model, or use --allow-nonfinite"
        )

    def outgoing(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Values cast to their final type, flat, on the host."""
        buffer = self._buffer("out", values.numel(), dtype, host=True)
        buffer.copy_(values.reshape(-1), non_blocking=True)
        self.wait()
        return buffer

    def wait(self) -> None:
        """Return when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _buffer(self, slot: str, numel: int, dtype: torch.dtype, host: bool = False) -> Tensor:
        """A buffer that is used again by every tile; in pinned memory where the device copies from and to it."""
        key = (slot, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < numel:
            on_host = host or self.device.type == "cpu"
            pinned = host and self.device.type == "cuda"
            device = torch.device("cpu") if on_host else self.device
            buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device, pin_memory=pinned)
        return buffer[:numel]


def whole_rows(item: Item, grain: Grain, size: int) -> int:
    """About so many elements of an item, in whole rows (at least one) where the grain wants them."""
    return max(1, size // item.site.row) * item.site.row if grain == "row" else size


def row_step(columns: int, device: torch.device, experts: bool = False) -> int:
    """Rows in a tile: a multiple of 64 that no limit changes, since a product's last bits depend on the rows in it.

    Of ``experts`` every row is a matrix, and its product one of its own.
    """
    size = TILE if device.type == "cpu" else GPU_TILE
    rows = 1 if experts else 64
    return rows * max(1, size // (rows * max(1, columns)))
