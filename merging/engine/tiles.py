"""Cutting a tensor of the merge into tiles: the models' changes or weights of a piece, in one type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from time import perf_counter

from merging.engine.devices import kind_of
from merging.engine.plain_items import read_plain
from merging.engine.staging import Staging
from merging.errors import InputError, option
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.kernels.steps import encode_sum
from merging.maths.kernels.switch import usable
from merging.maths.lazy_torch import Tensor, torch
from merging.plan.items import CHUNK, TILE, Item
from merging.plan.merge_plan import Plan
from merging.sources.changes import Change, ExtractedChange, LoraChange
from merging.sources.computed import ComputedChange
from merging.sources.stored import Stored
from merging.sources.stored_bytes import StoredBytes
from merging.sources.token_rows import TokenRows

__all__ = ["GPU_TILE", "Tile", "Tiler", "can_be_sampled", "tile_size", "unit_size"]

GPU_TILE = 1 << 24
"""Elements of one model merged at a time on a GPU, which wants few large kernels."""

_RUNS, _RUN = 8, 1 << 14
"""Runs of the sample of a span, at least, and elements of a run, at most: fewer and longer ones are read faster."""


@dataclass(slots=True)
class Tile:
    """A piece of a tensor: its flat offset, the models' changes or weights, and the base's values if they are needed.

    The base's values may be in the type of their file. The tensors are in the tiler's buffers: they are valid until
    the next tile.
    """

    start: int
    stack: Stack
    base: Tensor | None


class Tiler:
    """Reads pieces of the plan's items into buffers of its own, on one device; belongs to one worker.

    ``seconds`` is the time that it took to read tiles. With ``defers`` tiles for compiled kernels are not decoded until
    their changes are asked for.

    Raises :class:`~merging.errors.InputError` for values that are not finite, unless the recipe allows them.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.seconds, self.defers = 0.0, False
        self._buffers: dict[object, Tensor] = {}
        self._typed: tuple[Item, torch.dtype] | None = None
        self._staging: dict[torch.dtype, Staging] = {}

    def tiles(self, item: Item, start: int, stop: int) -> Iterator[Tile]:
        """Yield the tiles of an item from one flat offset to another."""
        step = item.cut.elements(tile_size(self.device))
        changes = self._changes(item)
        for position in range(start, stop, step):
            yield self._read_tile(item, (position,), min(step, stop - position), changes)

    def sample(self, item: Item, start: int, stop: int, share: int) -> Iterator[Tile]:
        """Yield tiles of about one element in ``share`` of an item that :func:`can_be_sampled`.

        The elements of a tile are runs of equal length, of whole rows where the item is cut by rows.
        """
        run = item.cut.elements(min(_RUN, max(1, (stop - start) // (_RUNS * share))))
        starts = range(start + share // 2 * run, stop - run + 1, share * run)
        step = max(1, tile_size(self.device) // run)
        for first in range(0, len(starts), step):
            some = starts[first : first + step]
            yield self._read_tile(item, some, len(some) * run, {})

    def _changes(self, item: Item) -> dict[int, Delta]:
        """Return the changes of adapters, by model, in a form that has rows."""
        # The change of a whole model needs no more than the tile of its tensor.
        adapters = (slot for slot, each in enumerate(item.inputs) if isinstance(each, Change))
        return {s: self._by_rows(item, s) for s in adapters if not isinstance(item.inputs[s], ExtractedChange)}

    def _read_tile(self, item: Item, starts: Sequence[int], size: int, changes: Mapping[int, Delta]) -> Tile:
        """Return a tile of runs of equal length, which begin at ``starts``; all but a sample has one run."""
        dtype, shape = item.dtype, item.cut.shape(item.site)
        present = tuple(each is not None for each in item.inputs)
        if self.defers and (deferred := self._read_stored(item, starts, size)):
            return deferred
        base = self._read("base", item.base, starts, size, dtype) if item.base is not None else None
        values = self._buffer("stack", len(present) * size, dtype).view(len(present), size)
        for slot, each in enumerate(item.inputs):
            if slot in changes:
                columns = prod(item.site.shape[1:])
                first, last = starts[0] // columns, (starts[0] + size) // columns
                values[slot].copy_(changes[slot].rows(first, last).dense().reshape(-1))
                if self.plan.weights and base is not None:
                    values[slot].add_(base)
            else:
                stored = each.value if isinstance(each, ExtractedChange) else each
                assert stored is None or isinstance(stored, Stored)
                self._read_change(values[slot], stored, starts, base, item.scale(slot))
        if not self.plan.recipe.allow_nonfinite:
            self._check(item, values, base)
        stack = Stack.of(values.view(len(present), *shape), self.plan.keys, present)
        stack.base = base.view(shape) if base is not None else None
        stack.layer_statistics = item.layer_statistics
        return Tile(starts[0], stack, stack.base)

    def _read_stored(self, item: Item, starts: Sequence[int], size: int) -> Tile | None:
        """Return a tile whose changes are decoded when they are asked for; None where torch must look at it."""
        found = read_plain(item, size, self._buffer, lambda into, stored: self._fill(into, stored, starts))
        if found is None:
            return None
        changes, base = found.changes(subtract=not self.plan.weights), found.base
        stack = Stack.of_stored(changes, self.plan.keys, tuple(each is not None for each in item.inputs))
        tile = Tile(starts[0], stack, base.view(changes.shape) if base is not None else None)
        stack.layer_statistics = item.layer_statistics
        return tile

    def _by_rows(self, item: Item, slot: int) -> Delta:
        """Return one adapter's change of an item, in a form that has rows."""
        change = self.change(item, slot)
        return change if item.site.shape else Dense(change.dense().view(1))

    def _read_change(
        self, into: Tensor, stored: Stored | None, starts: Sequence[int], base: Tensor | None, scale: float
    ) -> None:
        """Read one model's values of a tile, or their change from the base; a missing tensor changes nothing.

        The change is multiplied by ``scale``, also where its sum with the base is wanted.
        """
        if stored is not None:
            into.copy_(self._read_runs(stored, starts, into.numel()))
            if base is not None and (not self.plan.weights or scale != 1):
                into.sub_(base)
            if scale != 1:
                into.mul_(scale)
                if self.plan.weights and base is not None:
                    into.add_(base)
        elif self.plan.weights and base is not None:
            into.copy_(base)
        else:
            into.zero_()

    def raw(self, stored: Stored, start: int, size: int) -> Tensor:
        """Return elements of a stored tensor as they are, on the device; valid until the next call."""
        return self._read_runs(stored, (start,), size)

    def _read_runs(self, stored: Stored, starts: Sequence[int], size: int) -> Tensor:
        """Return runs of equal length of a stored tensor, ``size`` elements in all; valid until the next call."""
        staging = self._staging_of(stored.dtype) if self.device.type != "cpu" else None
        buffer = staging.claim(size) if staging else self._buffer("raw", size, stored.dtype)
        self._fill(buffer, stored, starts)
        return staging.send(buffer) if staging else buffer

    def _fill(self, buffer: Tensor, stored: Stored, starts: Sequence[int]) -> None:
        """Read runs of equal length of a stored tensor into a buffer."""
        began = perf_counter()
        if len(starts) == 1:
            stored.read_into(buffer, starts[0])
        else:
            run = len(buffer) // len(starts)
            for place, start in zip(range(0, len(buffer), max(1, run)), starts, strict=False):
                stored.read_into(buffer[place : place + run], start)
        self.seconds += perf_counter() - began

    def _staging_of(self, dtype: torch.dtype) -> Staging:
        if dtype not in self._staging:
            self._staging[dtype] = Staging(self.device, dtype)
        return self._staging[dtype]

    def _read(self, slot: str, stored: Stored, starts: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
        return self._buffer(slot, size, dtype).copy_(self._read_runs(stored, starts, size))

    def stack(self, item: Item) -> Stack:
        """Return all changes of an item as factors; the change of a model without it is a zero of rank 0."""
        found = [self.change(item, slot) if each is not None else None for slot, each in enumerate(item.inputs)]
        like = next(delta for delta in found if isinstance(delta, LowRank))
        deltas = [
            delta.oriented(like.transposed) if isinstance(delta, LowRank) else LowRank.zero(like) for delta in found
        ]
        stack = Stack(deltas, self.plan.keys, [delta is not None for delta in found])
        if self.plan.recipe.method.needs_base and item.base is not None:
            stack.base = item.base.read().to(self.device, item.dtype)
        return stack.with_statistics(item.layer_statistics)

    def change(self, item: Item, slot: int) -> Delta:
        """Return one adapter's change of a whole item, on the device."""
        change, dtype = item.inputs[slot], self._dtype_of(item)
        assert isinstance(change, Change)

        def base() -> Tensor:
            if item.base is None:
                raise InputError(
                    f"{self.plan.models[slot].path}: {change.target}: {change.needs_base}: give {option('base')}"
                )
            return item.base.read().to(dtype)

        self._check_layer(item, slot)
        delta = change.read(item.site.shape, base, dtype)
        parts = (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.value,)
        if not self.plan.recipe.allow_nonfinite and not all(bool(part.isfinite().all()) for part in parts):
            raise self._not_finite(self.plan.models[slot].path, change.target)
        scale = item.scale(slot)
        return (delta if scale == 1 else delta.scaled(scale)).to(self.device)

    def _dtype_of(self, item: Item) -> torch.dtype:
        """Return the type of an item. It depends on all models, and is kept while one after the other is read."""
        if self._typed is None or self._typed[0] is not item:
            self._typed = item, item.dtype
        return self._typed[1]

    def _check_layer(self, item: Item, slot: int) -> None:
        """Refuse factors or rows saved with a layer that is not the base's: they belong on top of that layer."""
        change = item.inputs[slot]
        if not isinstance(change, (LoraChange, ComputedChange, TokenRows)) or item.base is None:
            return
        if change.layer is None or (isinstance(change, LoraChange) and change.start):
            return
        for start in range(0, item.numel, TILE):
            size = min(TILE, item.numel - start)
            ours = self._read("base", item.base, (start,), size, torch.float32)
            # it may have been rounded to the precision of the training
            if not torch.allclose(self.raw(change.layer, start, size).float(), ours, rtol=2**-7, atol=1e-6):
                trained = "rows" if isinstance(change, TokenRows) else "factors"
                raise InputError(
                    f"{self.plan.models[slot].path}: {change.target}: the layer saved along with its {trained} is not "
                    f"the base's: was it trained, or its vocabulary changed? Give the base that it belongs to"
                )

    def _check(self, item: Item, values: Tensor, base: Tensor | None) -> None:
        # One sum per tile shows that all is finite; only where it is not, each value is looked at.
        finite = isfinite(float(values.sum()))
        if finite and not self.plan.weights:
            return  # a change from a base that is not finite is not finite either
        if base is not None and not isfinite(float(base.sum())) and not bool(base.isfinite().all()):
            raise self._base_not_finite(item)
        if not finite:
            for slot, value in enumerate(values):
                if not bool(value.isfinite().all()):
                    raise self._not_finite(self.plan.models[slot].path, item.site.name)

    def check_finite(self, item: Item, values: Tensor) -> None:
        """Check values that are copied. Raises :class:`~merging.errors.InputError` for NaN and infinities."""
        if not self.plan.recipe.allow_nonfinite and not isfinite(float(values.sum())) and not values.isfinite().all():
            model = self.plan.reference or self.plan.models[0]
            raise self._not_finite(model.path, item.site.name)

    def check_bytes(self, item: Item, stored: StoredBytes, data: Tensor) -> None:
        """Check bytes that are copied. Raises :class:`~merging.errors.InputError` for NaN and infinities in them."""
        if not self.plan.recipe.allow_nonfinite and not stored.all_finite(data):
            model = self.plan.reference or self.plan.models[0]
            raise self._not_finite(model.path, item.site.name)

    def check_base(self, item: Item) -> None:
        """Check the base's tensor. Raises :class:`~merging.errors.InputError` for NaN and infinities."""
        if item.base is not None and not self.plan.recipe.allow_nonfinite and not item.base.finite():
            raise self._base_not_finite(item)

    def _base_not_finite(self, item: Item) -> InputError:
        return self._not_finite(self.plan.base.path if self.plan.base is not None else "the base", item.site.name)

    @staticmethod
    def _not_finite(path: object, name: str) -> InputError:
        return InputError(
            f"{path}: {name} holds NaN or infinite values, which would spread over the merge: repair or leave out this "
            f"model, or use {option('allow_nonfinite', True)}"
        )

    def encode_sum(self, change: Tensor, base: Tensor | None, factor: float, dtype: torch.dtype) -> Tensor | None:
        """Return the base plus a change times a factor, in the final type, flat; None where torch must compute it."""
        if not self.defers or not usable(change, base):
            return None
        buffer = self._buffer("out", change.numel(), dtype, host=True)
        return buffer if encode_sum(change.view(-1), base, factor, buffer) else None

    def outgoing(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return values cast to their final type, flat, on the host."""
        buffer = self._buffer("out", values.numel(), dtype, host=True)
        buffer.copy_(values.reshape(-1), non_blocking=True)
        if self.device.type != "cpu":
            self.wait()
        return buffer

    def wait(self) -> None:
        """Return when the device has finished its work."""
        kind_of(self.device).synchronize(self.device)

    def _buffer(self, slot: str, numel: int, dtype: torch.dtype, host: bool = False) -> Tensor:
        """Return a buffer that every tile uses again; pinned memory where the device copies from and to it."""
        key = (slot, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            on_host = host or self.device.type == "cpu"
            pinned = host and kind_of(self.device).pins
            device = torch.device("cpu") if on_host else self.device
            buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device, pin_memory=pinned)
        return buffer[:numel]


def can_be_sampled(item: Item) -> bool:
    """Return whether a part of an item's elements can be read without the others."""
    return item.cut.way in ("elements", "rows") and not item.changes


def tile_size(device: torch.device) -> int:
    """Return the number of elements of one model in a tile, which no limit changes."""
    return TILE if device.type == "cpu" else GPU_TILE


def unit_size(device: torch.device) -> int:
    """Return the number of elements of one model in a unit of work."""
    return CHUNK if device.type == "cpu" else 4 * GPU_TILE
