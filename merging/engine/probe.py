"""Measuring the units that a worker merges, from tiles and factors that are in memory anyway."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, isfinite, prod
from time import perf_counter

from merging.engine.tiles import Tiler
from merging.engine.unit import row_blocks
from merging.hub.remote import RemoteFile
from merging.maths.delta import Delta, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Coefficient
from merging.plan.items import Item
from merging.plan.merge_plan import Plan
from merging.sources.stored import Stored, holders_of

__all__ = ["PROBE_BYTES", "Probe", "find_references"]

_PIECE = 1 << 18
"""Elements that are measured at a time: few enough for a core's own cache, and for sums in float32."""

_GPU_PIECE = 1 << 22

_SAMPLE = 4
"""Interference is measured in one of this many pieces, since it takes twice the time of all else together."""

_ROWS = 1 << 12
"""Rows of factors whose products are summed at a time."""

PROBE_BYTES = 8 * 5 * _PIECE + (1 << 20)
"""Memory of a probe on a CPU."""


class Probe:
    """Measures the change that one worker merges, and the models' changes that it is made of.

    The numbers of a unit are taken when it is merged; see :class:`~merging.engine.measures.Measure`. Changes are in the
    type of the computation, before they are rounded to the type of the output or cut to its rank.

    Args:
        tiler: the reader of the worker.
    """

    def __init__(self, tiler: Tiler) -> None:
        self.tiler, self.plan = tiler, tiler.plan
        self.references = find_references(tiler.plan)
        self.seconds = 0.0
        self._rows: list[list[float]] = []
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._piece = _PIECE if tiler.device.type == "cpu" else _GPU_PIECE

    def take(self) -> list[float]:
        """Return the numbers of the unit that was merged, empty where it has no change, and begin another one."""
        rows, self._rows = self._rows, []
        return [_sum(column) for column in zip(*rows, strict=True)]

    def add_block(
        self,
        item: Item,
        start: int,
        stack: Stack,
        merged: Tensor,
        base: Tensor | None,
        *,
        change: bool,
        factor: Coefficient = 1.0,
    ) -> None:
        """Measure a block of a tensor.

        Args:
            item: the tensor.
            start: the flat offset of the block.
            stack: the models' changes, or weights as the plan says.
            merged: the merged change, or the merged weights.
            base: the base's values, where they are at hand.
            change: whether ``merged`` is a change.
            factor: the number that multiplies the merged change in the end.
        """
        began = perf_counter()
        if base is None:
            base = self._read_base(item, start, merged.numel())
        parents = stack.dense().reshape(len(stack), -1)
        merged, base = merged.reshape(-1), None if base is None else base.reshape(-1)
        weights = self._weights(item)
        sums: list[Tensor] = []
        sampled = 0
        for first in range(0, merged.numel(), self._piece):
            here = slice(first, first + self._piece)
            models, piece = parents[:, here], merged[here]
            origin = None if base is None else base[here]
            sums += self._sum_squares(models, piece, origin, change=change)
            if self._is_sampled(start + first, len(models), origin):
                sums += self._sum_magnitudes(models, origin, weights)
                sampled += len(piece)
            else:
                sums += [merged.new_zeros(())] * 3
        if sums:
            table = torch.stack(sums).view(-1, 5 + 2 * len(parents)).double().T.tolist()
            self._keep((merged.numel(), sampled), list(map(_sum, table)), weights, float(factor))
        self.seconds += perf_counter() - began

    def add_whole(
        self, item: Item, stack: Stack, merged: Delta, base: Tensor | None, *, change: bool, factor: Coefficient = 1.0
    ) -> None:
        """Measure a whole tensor; the arguments are the same as for a block."""
        if stack.low_rank and isinstance(merged, LowRank):
            self._add_factors(item, stack, merged, float(factor))
            return
        columns = prod(item.site.shape[1:])
        for first, last, block in row_blocks(merged, self.tiler.device):
            rows = stack.rows(first, last) if item.site.shape else stack
            part = base[first:last] if base is not None and item.site.shape else base
            self.add_block(item, first * columns, rows, block.dense(), part, change=change, factor=factor)

    def _is_sampled(self, start: int, models: int, base: Tensor | None) -> bool:
        """Return whether interference is measured in a piece: between known changes of several models."""
        known = base is not None or not self.plan.weights
        return known and models > 1 and start // self._piece % _SAMPLE == 0

    def _sum_squares(self, parents: Tensor, merged: Tensor, base: Tensor | None, *, change: bool) -> list[Tensor]:
        """Return sums over a piece that is small enough for float32: squares of the base, of the merged change and of
        each model's, then the products of these with the merged change."""
        if not change and base is not None:
            merged = torch.sub(merged, base, out=self._buffer("merged", len(merged), merged.dtype))
        zero = merged.new_zeros(())
        squares, products = [], []
        for values in parents:
            if self.plan.weights:
                # without a base nothing says what a model changed: its difference from the merged weights is measured
                other = merged if base is None else base
                values = torch.sub(values, other, out=self._buffer("change", len(values), values.dtype))
            squares.append(torch.dot(values, values))
            products.append(zero if self.plan.weights and base is None else torch.dot(values, merged))
        return [zero if base is None else torch.dot(base, base), torch.dot(merged, merged), *squares, *products]

    def _sum_magnitudes(self, parents: Tensor, base: Tensor | None, weights: Sequence[float]) -> list[Tensor]:
        """Return sums over a piece: of all magnitudes, of the magnitude of the sum, and of magnitudes in conflict."""
        size, dtype = parents.shape[1], parents.dtype
        change, total, magnitude = (self._buffer(name, size, dtype) for name in ("change", "total", "magnitude"))
        for number, (values, weight) in enumerate(zip(parents, weights, strict=True)):
            if self.plan.weights and base is not None:
                values = torch.sub(values, base, out=change)
            if number == 0:
                torch.abs(torch.mul(values, weight, out=total), out=magnitude)
            else:
                total.add_(values, alpha=weight)
                magnitude.add_(torch.abs(values, out=change), alpha=abs(weight))
        # rounded in the same way, both are equal where all models change in one direction
        return [magnitude.sum(), total.abs_().sum(), torch.dot(magnitude, total.lt_(magnitude))]

    def _add_factors(self, item: Item, stack: Stack, merged: LowRank, factor: float) -> None:
        """Measure changes that are factors from these alone, and their interference in a sample of rows."""
        began = perf_counter()
        weights = self._weights(item)
        deltas = [delta for delta in stack.deltas if isinstance(delta, LowRank)]
        merged = merged.oriented(deltas[0].transposed)
        squares = [max(0.0, _inner(delta, delta)) for delta in deltas]
        products = [_inner(delta, merged) for delta in deltas]
        square = max(0.0, _inner(merged, merged))
        interference, sampled = [0.0, 0.0, 0.0], 0
        if len(deltas) > 1:
            sample = torch.stack([_sample_rows(delta, _PIECE).reshape(-1) for delta in deltas])
            interference = torch.stack(self._sum_magnitudes(sample, None, weights)).double().tolist()
            sampled = sample.shape[1]
        sums = [self._sum_base(item), square, *squares, *products, *interference]
        self._keep((item.numel, sampled), sums, weights, factor)
        self.seconds += perf_counter() - began

    def _keep(self, sizes: tuple[int, int], sums: Sequence[float], weights: Sequence[float], factor: float) -> None:
        """Keep the numbers of a block, whose merged change is multiplied by ``factor``.

        ``sizes`` are the numbers of elements, and of sampled ones. ``sums`` are squares, products and magnitudes.
        """
        count = len(weights)
        base, merged, *rest = sums
        squares, products, magnitudes = rest[:count], rest[count : 2 * count], rest[2 * count :]
        products = [factor * each for each in products]
        parts = [weight * each for weight, each in zip(weights, products, strict=True)]
        self._rows.append([*sizes, base, factor * factor * merged, *magnitudes, *squares, *products, *parts])

    def _weights(self, item: Item) -> list[float]:
        """Return the weight of each model at a tensor, 1 where the method has none."""
        return [float(each) for each in self.plan.recipe.method.at(item.site).coefficients(len(item.inputs))]

    def _read_base(self, item: Item, start: int, size: int) -> Tensor | None:
        stored = item.base or self.references.get(item.site.name)
        if stored is None:
            return None
        return self._buffer("base", size, item.dtype).copy_(self.tiler.raw(stored, start, size))

    def _sum_base(self, item: Item) -> float:
        """Return the sum of the squares of the base's values."""
        squares = []
        for start in range(0, item.numel, self._piece):
            base = self._read_base(item, start, min(self._piece, item.numel - start))
            squares += [] if base is None else [float(torch.dot(base, base))]
        return _sum(squares)

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer that every piece uses again."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self.tiler.device)
        return buffer[:size]


def find_references(plan: Plan) -> dict[str, Stored]:
    """Return the base's tensors that a merge of weights does not read, by name: what it changed is measured from them.

    Tensors of files that would have to be downloaded are left out.
    """
    if plan.base is None or not plan.weights:
        return {}
    there = {name: stored for name, stored in plan.base.tensors.items() if _is_at_hand(stored)}
    return {
        item.site.name: there[item.site.name]
        for item in plan.items
        if item.base is None and item.site.name in there and there[item.site.name].shape == item.site.shape
    }


def _is_at_hand(stored: Stored) -> bool:
    return all(not isinstance(holder, RemoteFile) or holder.at_hand for holder in holders_of([stored]))


def _sum(values: Sequence[float]) -> float:
    """Return the sum, rounded once; NaN where it has none."""
    return fsum(values) if all(map(isfinite, values)) else float("nan")


def _inner(one: LowRank, other: LowRank) -> float:
    """Return the inner product of two changes of the same orientation, from their factors."""
    ups = _cross(one.up.mT, other.up.mT)
    downs = _cross(one.down, other.down)
    return float((ups * downs).sum())


def _cross(one: Tensor, other: Tensor) -> Tensor:
    """Return ``one @ other.mT`` in float64, a part of their columns at a time."""
    total = torch.zeros(*one.shape[:-1], other.shape[-2], dtype=torch.float64, device=one.device)
    for start in range(0, one.shape[-1], _ROWS):
        left, right = (each[..., start : start + _ROWS].double() for each in (one, other))
        total += left @ right.mT
    return total


def _sample_rows(delta: LowRank, elements: int) -> Tensor:
    """Return evenly spaced rows of a change, of about this many elements; of experts, some rows of some of them."""
    up, down = delta.up, delta.down
    if up.dim() > 2:
        experts = _spread(up.shape[:-2].numel(), 8, up.device)
        up, down = up.flatten(0, -3)[experts], down.flatten(0, -3)[experts]
    wanted = max(1, elements // max(1, up.shape[:-2].numel() * down.shape[-1]))
    return up[..., _spread(up.shape[-2], wanted, up.device), :] @ down


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """Return at most ``most`` evenly spaced numbers below ``count``."""
    taken = min(count, most)
    return torch.arange(taken, device=device) * count // max(1, taken)
