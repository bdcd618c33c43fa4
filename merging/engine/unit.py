"""One unit of work, read as tiles, or as a whole tensor where a method or a wrapper needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

from merging.engine.tiles import Tiler, can_be_sampled, tile_size
from merging.errors import InputError, MergingError, OptionError, option
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.reductions import Accumulator
from merging.maths.site import Site
from merging.maths.stored_values import StoredValues
from merging.methods.contract.method import Method, Statistic, Statistics
from merging.methods.contract.wrapper import Unwrapped, unwrap_outer
from merging.plan.cuts import cut_rows, cut_stack
from merging.plan.items import TILE, Item

__all__ = ["Block", "Span", "WorkUnit", "accumulate", "name_failures", "row_blocks", "row_step"]

_SHARES = {"tensor": 32, "model": 128}
"""One element in this many is in the sample of a tensor, and in the sample of a model."""

_REMEMBERED = 1 << 26
"""Elements of all models in the blocks of a tensor that remember what methods computed of them."""

_SAMPLED = 1 << 18
"""Elements of a tensor from which a sample of it is taken."""


class Span:
    """The elements of an item from ``start`` to ``stop``, which one worker merges at a time; ``bytes`` are read."""

    __slots__ = ("bytes", "item", "start", "stop")

    def __init__(self, item: Item, start: int, stop: int) -> None:
        self.item, self.start, self.stop = item, start, stop
        self.bytes = item.read_bytes * (stop - start) // max(1, item.numel)


class Block(NamedTuple):
    """A block that a method merges: its site, the models' changes, and the base's values where they are needed."""

    site: Site
    stack: Stack
    base: Tensor | None


class WorkUnit:
    """A span of an item, with the method bound at its site.

    Attributes:
        method: the method that is left to apply.
        stack: the models' changes of the whole item, where the method needs it whole or as factors, else None.
        base: the base's values of the whole item, where ``stack`` is there and they are needed.
        unwrapped: ``stack`` as the outer wrappers transformed it; None where the unit is read as tiles.
    """

    def __init__(self, span: Span, tiler: Tiler, statistics: Statistics, kept: dict[str, Unwrapped]) -> None:
        self.span, self.tiler = span, tiler
        item = span.item
        self.method = tiler.plan.recipe.method.at(item.site)
        self.stack: Stack | None = None
        self.base: Tensor | None = None
        self.unwrapped: Unwrapped | None = None
        if item.cut.way == "factors":
            self.stack = tiler.stack(item)
        elif item.cut.way == "whole" and item.numel:
            (tile,) = tiler.tiles(item, span.start, span.stop)
            self.stack, self.base = tile.stack, tile.base
        if self.stack is not None:
            self.unwrapped = kept.get(item.site.name) or unwrap_outer(self.method, self.stack, item.site, statistics)
            self.method = self.unwrapped.then
        self._statistics = dict(statistics)
        self._memos: dict[int, dict[object, Tensor]] = {}
        self._goes_again = any(each.per == "tensor" for each in self.method.required_statistics())

    def blocks(self, share: int = 1) -> Iterator[Block]:
        """Yield the blocks that the method merges, or a sample of one element in ``share``."""
        item, unwrapped = self.span.item, self.unwrapped
        if unwrapped is None:
            start, stop = self.span.start, self.span.stop
            tiles = self.tiler.tiles(item, start, stop) if share == 1 else self.tiler.sample(item, start, stop, share)
            for tile in tiles:
                if share == 1 and (tile.start - start) * len(tile.stack) < _REMEMBERED and self._goes_again:
                    tile.stack.memo = self._memos.setdefault(tile.start, {})
                yield Block(item.site.block(tile.stack.shape, tile.start), tile.stack, tile.base)
            return
        stack, site = unwrapped.stack, unwrapped.site
        cut = cut_stack(site, stack.low_rank, self.method)
        if cut.way != "blocks":
            yield Block(site, stack, None)
            return
        columns = prod(site.shape[1:])
        step = max(1, cut.elements(tile_size(self.tiler.device)) // max(1, columns))
        for first in range(0, site.shape[0], step):
            last = min(first + step, site.shape[0])
            yield Block(site.block((last - first, *site.shape[1:]), first * columns), stack.rows(first, last), None)

    def statistics(self, before: str | None = None) -> Statistics:
        """Return the statistics, all or up to ``before``, and gather the statistics of this tensor alone.

        :mod:`merging.engine.in_memory` does the same for tensors in memory: change both.
        """
        for each in self.method.required_statistics():
            if each.name == before:
                break
            if each.per == "tensor" and each.name not in self._statistics:
                accumulator = each.reduction.widen(self.span.item.dtype).start()
                if self.span.stop - self.span.start >= _SAMPLED and can_be_sampled(self.span.item):
                    accumulator.begin_sample()
                while True:
                    self.accumulate(each, accumulator, self._statistics)
                    if not accumulator.next():
                        break
                self._statistics[each.name] = accumulator.result()
        return self._statistics

    def accumulate(self, statistic: Statistic, accumulator: Accumulator, statistics: Statistics) -> None:
        """Feed an accumulator with what a statistic measures of this unit, or of a sample of it."""
        share = _SHARES[statistic.per] if accumulator.sampling else 1
        for site, stack, _ in self.blocks(share):
            accumulate(accumulator, statistic.measure(stack, site, statistics), site.name)

    def statistic(self, name: str) -> Statistic:
        """Return a statistic of the method as it is bound at this site."""
        return next(each for each in self.method.required_statistics() if each.name == name)

    def merge_whole(self) -> Delta:
        """Merge the whole item, which is unwrapped, into its change (or weight)."""
        assert self.unwrapped is not None
        statistics, shape = self.statistics(), self.unwrapped.site.shape
        out: Tensor | None = None
        for site, stack, _ in self.blocks():
            merged = self.method.merge(stack, site, statistics)
            if site.shape == shape:
                return self.unwrapped.rewrap(merged)
            values = merged.dense()
            if out is None:
                out = values.new_empty(shape)
            first = site.start // max(1, prod(shape[1:]))
            out[first : first + len(values)] = values
        assert out is not None
        return self.unwrapped.rewrap(Dense(out))


@contextmanager
def name_failures(name: str, method: Method) -> Iterator[None]:
    """Turn failures into errors that name the tensor: of a decomposition, and of a method from outside the package.

    Raises:
        InputError: for a decomposition that fails.
        OptionError: for a GPU without enough memory, and from any error that a method from outside raises.
    """
    try:
        yield
    except (MergingError, MemoryError, OSError):
        raise
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        reason = str(error).rstrip(".")
        raise InputError(f"{name}: cannot be decomposed, as NaN and infinities cannot: {reason}") from None
    except torch.OutOfMemoryError:
        raise OptionError(
            f"{name}: the GPU has too little memory for it next to the other workers' tensors: use fewer workers "
            f"({option('threads', 1)} takes the least), more GPUs, or {option('device', 'cpu')}"
        ) from None
    except Exception as error:
        links = [link for link in method.links() if not type(link).__module__.startswith("merging.")]
        if not links:
            raise
        own = "+".join(link.name for link in links)
        raise OptionError(f"the method {own} failed at {name}: {type(error).__name__}: {error}") from error


def accumulate(accumulator: Accumulator, values: Tensor | StoredValues, name: str) -> None:
    """Feed an accumulator with values of a tensor, which an error then names.

    Raises :class:`~merging.errors.InputError` for values that poison the result.
    """
    try:
        accumulator.add(values, name)
    except ValueError as error:
        raise InputError(
            f"{error}: this method cannot merge them: leave the tensor out with {option('exclude')}, or the model; if "
            f"all values are finite, their squares are not in float32: use {option('dtype', 'float64')}"
        ) from None


def row_blocks(delta: Delta, device: torch.device) -> Iterator[tuple[int, int, Delta]]:
    """Yield a change by blocks of rows: the first row, the end of the block, and its rows."""
    if isinstance(delta, Dense) and not delta.shape:
        yield 0, 1, Dense(delta.value.view(1))
        return
    rows, step = delta.shape[0], row_step(delta, device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield first, last, delta.rows(first, last)


def row_step(delta: Delta, device: torch.device) -> int:
    """Return the number of rows in a block of a change."""
    columns = max(1, prod(delta.shape[1:]))
    if isinstance(delta, LowRank):
        return cut_rows(columns, delta.up.dim() > 2).elements(tile_size(device)) // columns
    return max(1, TILE // columns)
