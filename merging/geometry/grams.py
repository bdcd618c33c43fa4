"""Inner products of all pairs of models: through the products of their factors, or by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from merging.engine.tiles import Tiler
from merging.errors import InputError, OptionError
from merging.geometry.alignment import MEMORY, ModelLike, align, factored, matrix_sides, row_blocks
from merging.maths.delta import LowRank
from merging.maths.sums import spans
from merging.methods.families.spherical import cosines as normalised
from merging.plan import Item, Plan
from merging.plan.items import TILE
from merging.progress import Progress
from merging.sources.changes import Change

__all__ = ["cosines", "gram", "groups_of", "module_grams", "segment_sums"]

_DOUBLE = 1 << 33
"""Multiplications of factors up to which they are done in float64."""

_ROWS = 1 << 25
"""Most bytes of a block of products of factors, of which two are held."""

_CPU = torch.device("cpu")


def gram(
    models: Sequence[ModelLike],
    *,
    max_memory: int = MEMORY,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> Tensor:
    """The inner products ``[n, n]`` of what the models change, over all tensors; float64.

    Of adapters only the factors are touched: ``<B_1 A_1, B_2 A_2>`` is the sum of the entries of
    ``(B_1^T B_2) * (A_1 A_2^T)``, taken for all pairs by one product of the stacked factors a tensor, in blocks. A
    tensor that a model does not touch is a zero change. Products are float64 where they are cheap and float32 where
    there are very many, then with an error of about 1e-6 of the norms; sums are float64. Where ranks are so high that
    the products of rows are cheaper than those of factors, rows are built in blocks, as they are for full checkpoints.

    ``max_memory`` is in bytes, above what the imports take and the headers of the models. ``options`` are those of
    :func:`~merging.geometry.alignment.align` (``base`` and others). Raises :class:`~merging.errors.MergingError`.
    """
    plan = align(models, **options)
    total = torch.zeros(len(plan.models), len(plan.models), dtype=torch.float64)
    done, whole = 0, plan.read_bytes
    for item, products in module_grams(plan, max_memory, torch.device(device)):
        total += products
        done += item.read_bytes
        if progress:
            progress(done, whole)
    return total


def cosines(models: Sequence[ModelLike], **options: Any) -> Tensor:
    """The cosines ``[n, n]`` between what the models change, float64; takes the options of :func:`gram`.

    A change of nothing is at a right angle to all, itself included.
    """
    return normalised(gram(models, **options))[1]


def module_grams(plan: Plan, max_memory: int = MEMORY, device: torch.device = _CPU) -> Iterator[tuple[Item, Tensor]]:
    """Each item of an aligned plan with its inner products, ``[n, n]`` float64 on the CPU.

    Raises :class:`~merging.errors.InputError` for values that are not finite or whose squares overflow,
    :class:`~merging.errors.OptionError` where ``max_memory`` does not hold two changes of a tensor.
    """
    for item in plan.items:
        products = _products(plan, item, max_memory, device)
        finite = products.diagonal().isfinite()
        if not bool(finite.all()):
            path = plan.models[int((~finite).nonzero()[0])].path
            raise InputError(
                f"{path}: {item.site.name} holds NaN or infinite values, or such whose squares are not in float32: "
                f"repair this model or leave it out"
            )
        # Factors that cancel have a squared norm of rounding errors, which may be below zero.
        products.diagonal().clamp_(min=0)
        yield item, products


def _products(plan: Plan, item: Item, max_memory: int, device: torch.device) -> Tensor:
    """The inner products of one item, by groups of models so small that two of them are held at once."""
    by_factors = factored(item) and _factors_are_cheaper(item)
    groups = groups_of(plan, item, by_factors, max_memory)
    out = torch.zeros(len(plan.models), len(plan.models), dtype=torch.float64)
    for position, group in enumerate(groups):
        others = groups[position:]
        if by_factors:
            blocks = _by_factors(Tiler(plan, device), item, group, others, _block_bytes(max_memory))
        else:
            blocks = (_by_rows(plan, item, group, other, device) for other in others)
        rows = torch.tensor(group)[:, None]
        for other, block in zip(others, blocks, strict=True):
            columns = torch.tensor(other)
            out[rows, columns] = block
            out[columns[:, None], rows[:, 0]] = block.mT
    return out


def _by_factors(
    tiler: Tiler, item: Item, group: list[int], others: list[list[int]], block_bytes: int
) -> Iterator[Tensor]:
    """The inner products of a group of models with itself and with those after it, ``[group, other]`` each."""
    held = _Factors.of(tiler, item, group)
    for other in others:
        yield held.products(held if other is group else _Factors.of(tiler, item, other), block_bytes)


def _changes(item: Item) -> list[Change]:
    return [each for each in item.inputs if isinstance(each, Change)]


def _factors_are_cheaper(item: Item) -> bool:
    """Whether the products of all factors take fewer multiplications than rows and their products."""
    _, rows, columns = matrix_sides(item)
    total, models = sum(each.rank for each in _changes(item)), len(_changes(item))
    return total**2 * (rows + columns) <= (models**2 + 2 * total) * rows * columns


def _factor_dtype(plan: Plan, item: Item) -> torch.dtype:
    """float64 where the products of factors are few."""
    count, rows, columns = matrix_sides(item)
    total = sum(each.rank for each in _changes(item))
    return torch.float64 if count * total**2 * (rows + columns) <= _DOUBLE else item.dtype


def groups_of(plan: Plan, item: Item, by_factors: bool, max_memory: int) -> list[list[int]]:
    """The models that change an item: all in one group if that fits, else in such of which two fit."""
    sizes = {slot: _bytes_of(plan, item, slot, by_factors) for slot, each in enumerate(item.inputs) if each is not None}
    largest, models = max(sizes.values()), len(plan.models)
    # Reading a change takes it twice more for a moment; and there are a few matrices of all pairs.
    room = max_memory - 2 * largest - 4 * 8 * models**2 - (2 * _block_bytes(max_memory) if by_factors else 0)
    if sum(sizes.values()) <= room:
        return [list(sizes)]
    if 2 * largest > room:
        needed = max_memory - room + 2 * largest
        raise OptionError(f"{item.site.name} takes {ceil(needed / 1e6)} MB to compare: raise --max-memory to that")
    groups: list[list[int]] = [[]]
    taken = 0
    for slot, size in sizes.items():
        if taken + size > room // 2:
            groups, taken = [*groups, []], 0
        groups[-1].append(slot)
        taken += size
    return groups


def _block_bytes(max_memory: int) -> int:
    return min(_ROWS, max_memory // 8)


def _bytes_of(plan: Plan, item: Item, slot: int, by_factors: bool) -> int:
    """The bytes that one model's change takes while it is multiplied."""
    count, rows, columns = matrix_sides(item)
    each = item.inputs[slot]
    low = each.rank * (rows + columns) if isinstance(each, Change) and each.low_rank else None
    if by_factors:
        return _factor_dtype(plan, item).itemsize * count * (low or 0)
    whole = low if low is not None else rows * columns if isinstance(each, Change) else 0
    # A block of rows is there twice: as it was read, and in the spans that are multiplied.
    block = min(rows * columns, max(TILE, 64 * columns))
    return item.dtype.itemsize * count * (whole + 3 * block)


@dataclass(slots=True)
class _Factors:
    """The factors of some models' changes in one tensor, on top of each other: ``ups [batch, R, out]`` and
    ``downs [batch, R, in]``; ``owners [R]`` says whose a row is, ``starts`` where each model's begin."""

    ups: Tensor
    downs: Tensor
    owners: Tensor
    starts: list[int]

    @classmethod
    def of(cls, tiler: Tiler, item: Item, slots: Sequence[int]) -> _Factors:
        """Read them, one model at a time."""
        dtype = _factor_dtype(tiler.plan, item)
        ranks = [each.rank for slot in slots if isinstance(each := item.inputs[slot], Change)]
        starts = [sum(ranks[:position]) for position in range(len(ranks) + 1)]
        turned: bool | None = None
        for start, slot in zip(starts, slots, strict=False):
            delta = tiler.change(item, slot)
            assert isinstance(delta, LowRank)
            if turned is None:
                turned = delta.transposed
                batch = delta.up.shape[:-2].numel()
                ups = delta.up.new_zeros(batch, starts[-1], delta.up.shape[-2], dtype=dtype)
                downs = delta.up.new_zeros(batch, starts[-1], delta.down.shape[-1], dtype=dtype)
            delta = delta.oriented(turned)
            ups[:, start : start + delta.rank] = delta.up.mT
            downs[:, start : start + delta.rank] = delta.down
        owners = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
        return cls(ups, downs, owners.to(ups.device), starts)

    def products(self, other: _Factors, block_bytes: int) -> Tensor:
        """The inner products with others' changes, or of all pairs of these, ``[models, others]`` float64."""
        out = torch.zeros(len(self.starts) - 1, len(other.starts) - 1, dtype=torch.float64)
        width = self.ups.itemsize * max(1, other.starts[-1])
        for first, last in self._blocks(block_bytes // width):
            # Of the pairs of one group those below the diagonal follow from the others.
            after = first if other is self else 0
            block = self._block(other, first, last, after)
            out[first:last, after:] = block
        return out.triu() + out.triu(1).mT if other is self else out

    def _blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        """Consecutive models with about so many rows, at least one."""
        first = 0
        for last in range(1, len(self.starts)):
            if last == len(self.starts) - 1 or self.starts[last + 1] - self.starts[first] > rows:
                yield first, last
                first = last

    def _block(self, other: _Factors, first: int, last: int, after: int) -> Tensor:
        mine, theirs = slice(self.starts[first], self.starts[last]), slice(other.starts[after], None)
        owners, others = self.owners[mine] - first, other.owners[theirs] - after
        total = torch.zeros(last - first, len(other.starts) - 1 - after, dtype=torch.float64)
        for up, down, other_up, other_down in zip(self.ups, self.downs, other.ups, other.downs, strict=True):
            # Laid out with the others first, so that whole rows are added up below.
            terms = other_up[theirs] @ up[mine].mT
            terms *= other_down[theirs] @ down[mine].mT
            sums = segment_sums(terms, others, len(other.starts) - 1 - after)
            total += segment_sums(sums.mT.double(), owners, last - first).cpu()
        return total


def segment_sums(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """The sums of the rows ``[k, ...]`` that have the same owner, ``[count, ...]``."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, owners, values)


def _by_rows(plan: Plan, item: Item, group: list[int], other: list[int], device: torch.device) -> Tensor:
    """Inner products by blocks of rows, ``[group, other]``, over spans so short that float32 loses nothing."""
    same = group is other
    out = torch.zeros(len(group), len(other), dtype=torch.float64)
    for block in row_blocks(plan, item, group if same else [*group, *other], device):
        for piece in spans(block):
            pieces = piece if piece.dim() == 3 else piece[:, None]
            mine = pieces[: len(group)].transpose(0, 1)
            theirs = mine if same else pieces[len(group) :].transpose(0, 1)
            out += (mine @ theirs.mT).sum(0, dtype=torch.float64).cpu()
    return out
