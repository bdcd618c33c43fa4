"""A unit of work laid open for its method: in tiles as they are read, or entered whole by the outer wrappers first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.engine.tiles import Tiler, row_step
from merging.errors import InputError
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.reductions import Accumulator
from merging.maths.site import Site
from merging.methods.contract.method import Statistic, Statistics
from merging.methods.contract.wrapper import Unwrapped, unwrap_outer
from merging.plan.items import TILE, Item

__all__ = ["Opened", "Unit", "blocks", "decomposing", "feed"]

Piece = tuple[Site, Stack, Tensor | None]
"""A block's site, what the models bring to it, and the base's values there if they are wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A piece of an item, by flat offsets; the whole item unless it lies in full."""

    item: Item
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.item.read_bytes * (self.stop - self.start) // max(1, self.item.numel)


class Opened:
    """A unit whose method is bound at its place.

    Where the method wants tensors whole, or factors, ``entered`` is what the outer wrappers made of all of the item,
    ``stack`` what the models brought to it, and ``base`` its base, if that is wanted. Else both are None and the unit
    goes by tiles.
    """

    def __init__(self, unit: Unit, tiler: Tiler, statistics: Statistics, kept: dict[str, Unwrapped]) -> None:
        self.unit, self.tiler = unit, tiler
        item, plan = unit.item, tiler.plan
        self.method = plan.recipe.method.at(item.site)
        self.stack: Stack | None = None
        self.base: Tensor | None = None
        self.unwrapped: Unwrapped | None = None
        if plan.as_factors(item):
            self.stack = tiler.stack(item)
        elif self.method.grain_at(item.site) == "matrix" and item.numel:
            (tile,) = tiler.tiles(item, unit.start, unit.stop)
            self.stack, self.base = tile.stack, tile.base
        if self.stack is not None:
            self.unwrapped = kept.get(item.site.name) or unwrap_outer(self.method, self.stack, item.site, statistics)
            self.method = self.unwrapped.then
        self._seen = dict(statistics)

    def pieces(self) -> Iterator[Piece]:
        """What the method is to merge, block by block."""
        item, unwrapped = self.unit.item, self.unwrapped
        if unwrapped is None:
            for tile in self.tiler.tiles(item, self.unit.start, self.unit.stop):
                yield item.site.block(tuple(tile.stack.dense().shape[1:]), tile.start), tile.stack, tile.base
            return
        stack, site = unwrapped.stack, unwrapped.site
        by_factors = self.method.factored and stack.low_rank
        grain = self.method.grain_at(site)
        one_row = grain == "row" and site.kind == "vector"
        if by_factors or grain == "matrix" or one_row or not site.shape:
            yield site, stack, None
            return
        columns = torch.Size(site.shape[1:]).numel()
        step = row_step(columns, self.tiler.device, site.kind == "experts")
        for first in range(0, site.shape[0], step):
            last = min(first + step, site.shape[0])
            yield site.block((last - first, *site.shape[1:]), first * columns), stack.rows(first, last), None

    def statistics(self, before: str | None = None) -> Statistics:
        """The results of all rounds, or of those before one; those over this tensor alone are gathered now."""
        for each in self.method.required_statistics():
            if each.name == before:
                break
            if each.per == "tensor" and each.name not in self._seen:
                state = each.reduction.widened(self.tiler.plan.dtype(self.unit.item)).start()
                while True:
                    self.see(each, state, self._seen)
                    if not state.next():
                        break
                self._seen[each.name] = state.result()
        return self._seen

    def see(self, each: Statistic, state: Accumulator, statistics: Statistics) -> None:
        """Feed a round of the method with this unit."""
        for site, stack, _ in self.pieces():
            feed(state, each.measure(stack, site, statistics), site.name)

    def round(self, name: str) -> Statistic:
        """A round of the method at this place."""
        return next(each for each in self.method.required_statistics() if each.name == name)

    def merged(self) -> Delta:
        """The merged change (or weight) of the whole item, which was entered."""
        assert self.unwrapped is not None
        statistics, shape = self.statistics(), self.unwrapped.site.shape
        out: Tensor | None = None
        for site, stack, _ in self.pieces():
            merged = self.method.merge(stack, site, statistics)
            if site.shape == shape:
                return self.unwrapped.rewrap(merged)
            values = merged.dense()
            if out is None:
                out = values.new_empty(shape)
            first = site.start // max(1, torch.Size(shape[1:]).numel())
            out[first : first + len(values)] = values
        assert out is not None
        return self.unwrapped.rewrap(Dense(out))


@contextmanager
def decomposing(name: str) -> Iterator[None]:
    """Values of a tensor that no decomposition is found for become an error that names it."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        reason = str(error).rstrip(".")
        raise InputError(f"{name}: cannot be decomposed, as NaN and infinities cannot: {reason}") from None


def feed(state: Accumulator, values: Tensor, name: str) -> None:
    """Give values of a tensor to a fold, whose refusals become errors that name it."""
    try:
        state.add(values, name)
    except ValueError as error:
        raise InputError(
            f"{error}: this method cannot merge them: leave the tensor out with --exclude, or the model; if all values "
            f"are finite, their squares are not in float32: use --dtype float64"
        ) from None


def blocks(delta: Delta, device: torch.device) -> Iterator[tuple[int, int, Delta]]:
    """A change by blocks of rows: the first row, the one behind the last, and the rows."""
    if isinstance(delta, Dense) and not delta.shape:
        yield 0, 1, Dense(delta.value.view(1))
        return
    rows, columns = delta.shape[0], torch.Size(delta.shape[1:]).numel()
    step = max(1, TILE // max(1, columns))
    if isinstance(delta, LowRank):
        step = row_step(columns, device, delta.up.dim() > 2)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield first, last, delta.rows(first, last)
