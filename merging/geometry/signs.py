"""Agreement of models on the signs of changes, over all entries or over a sample of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import prod
from typing import Literal

from typing_extensions import Unpack

from merging.display.tables import Displayed
from merging.engine.tiles import Tiler
from merging.geometry.alignment import MEMORY, AlignOptions, ModelLike, align, row_blocks
from merging.geometry.grams import groups_of
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.plan import Item, Plan
from merging.sources.changes import Change
from merging.sources.stored import Stored

__all__ = ["Signs", "count_signs", "sign_agreement"]

_SAMPLE = 256
"""The rows that are sampled in a tensor, and the columns in each."""

_BATCH = 8
"""The experts that are sampled in a tensor whose rows are experts."""

_EXACT = 1 << 20
"""Entries counted at a time: float32 adds whole numbers below 2**24 exactly."""


@dataclass(frozen=True, slots=True, repr=False)
class Signs(Displayed):
    """Agreement of signs between ``n`` models.

    Attributes:
        agreement: The share of entries changed in the same direction, among those that both models change, ``[n, n]``
            float64; NaN for models without a common entry.
        entries: The number of entries that were counted in each model.
        total: The number of all entries.
    """

    agreement: Tensor
    entries: int
    total: int


def sign_agreement(
    models: Sequence[ModelLike],
    *,
    entries: Literal["sample", "all"] = "sample",
    max_memory: int = MEMORY,
    device: torch.device | str = "cpu",
    **options: Unpack[AlignOptions],
) -> Signs:
    """Return the models' agreement on the signs of changes; a half is chance.

    Factors are never multiplied out as a whole. An entry that is zero except for rounding counts with its sign.

    Args:
        models: The models: paths, addresses, or opened models.
        entries: ``"sample"`` draws 256 rows and columns of every tensor (the same for all models), and weights them by
            the tensor's size. Smaller tensors are counted in full. ``"all"`` counts every entry, by blocks of rows.
        max_memory: Bytes for the blocks of rows.
        device: The device that computes.
        **options: Options of :func:`~merging.geometry.alignment.align`, such as ``base``.

    Returns:
        The agreement of all pairs.

    Raises:
        merging.errors.MergingError: For models that cannot be read or do not fit together.
    """
    plan = align(models, **options)
    return count_signs(plan, entries, max_memory, torch.device(device))


def count_signs(
    plan: Plan, entries: Literal["sample", "all"], max_memory: int = MEMORY, device: torch.device | None = None
) -> Signs:
    """Return the agreement for an aligned plan."""
    device = device or torch.device("cpu")
    count = len(plan.models)
    same, both = torch.zeros(2, count, count, dtype=torch.float64)
    seen = total = 0
    for item in plan.items:
        if entries == "sample":
            rows, columns = _draw_sample(item)
            blocks, counted = _sample(plan, item, rows, columns, device), len(rows) * len(columns)
        else:
            blocks, counted = _count_all(plan, item, max_memory, device), item.numel
        weight = item.numel / max(1, counted)
        for group, other, difference, shared in blocks:
            first, second = torch.tensor(group)[:, None], torch.tensor(other)
            same[first, second] += weight * (shared + difference) / 2
            both[first, second] += weight * shared
        seen += counted
        total += item.numel
    same, both = (each.triu() + each.triu(1).mT for each in (same, both))
    return Signs(torch.where(both > 0, same / both, torch.nan), seen, total)


Counts = tuple[list[int], list[int], Tensor, Tensor]
"""Two groups of models, and two counts ``[group, other]`` float64: the entries changed in the same direction minus
those changed in opposite ones, and the entries that both change."""


def _count(group: list[int], other: list[int], signs: Tensor) -> Iterator[Counts]:
    """Yield the counts of signs (-1, 0, 1), ``[models, entries]``, for one group or two stacked groups."""
    for piece in torch.split(signs, _EXACT, 1):
        mine, theirs = piece[: len(group)], piece if other is group else piece[len(group) :]
        yield (
            group,
            other,
            (mine @ theirs.mT).cpu().double(),
            (mine.abs() @ theirs.abs().mT).cpu().double(),
        )


def _count_all(plan: Plan, item: Item, max_memory: int, device: torch.device) -> Iterator[Counts]:
    groups = groups_of(plan, item, False, max_memory)
    for group, other in combinations_with_replacement(groups, 2):
        for block in row_blocks(plan, item, group if other is group else [*group, *other], device):
            yield from _count(group, other, block.sign())


def _draw_sample(item: Item) -> tuple[Tensor, Tensor]:
    """Draw the rows of a tensor and the columns in each; all of a small tensor."""
    rows, columns = item.numel // max(1, _columns(item)), _columns(item)
    most = _BATCH if item.site.kind == "experts" else _SAMPLE
    width = min(columns, max(_SAMPLE, _SAMPLE**2 // min(rows, most)))
    random = torch.Generator().manual_seed(0)
    height = _SAMPLE**2 // width if item.numel > _SAMPLE**2 else rows
    drawn = torch.randperm(rows, generator=random)[:height].sort().values
    return drawn, torch.randperm(columns, generator=random)[:width].sort().values


def _columns(item: Item) -> int:
    return prod(item.site.shape[1:])


def _sample(plan: Plan, item: Item, rows: Tensor, columns: Tensor, device: torch.device) -> Iterator[Counts]:
    tiler = Tiler(plan, device)
    slots = [slot for slot, each in enumerate(item.inputs) if each is not None]
    signs = torch.empty(len(slots), len(rows) * len(columns), dtype=torch.int8, device=device)
    for into, slot in zip(signs, slots, strict=True):
        each = item.inputs[slot]
        if isinstance(each, Change):
            values = _entries(tiler.change(item, slot), rows.to(device), columns.to(device))
        else:
            values = torch.stack([_row(tiler, item, slot, row)[columns] for row in rows.tolist()])
        into.copy_(values.sign().flatten())
    for piece in torch.split(signs, 1 << 12, 1):
        yield from _count(slots, slots, piece.float())


def _entries(delta: Delta, rows: Tensor, columns: Tensor) -> Tensor:
    """Return some rows and columns of a change."""
    if isinstance(delta, LowRank) and delta.up.dim() == 2:
        if delta.transposed:
            return (delta.up[columns] @ delta.down[:, rows]).mT
        return delta.up[rows] @ delta.down[:, columns]
    if isinstance(delta, LowRank):
        return torch.stack([delta.rows(row, row + 1).dense().flatten()[columns] for row in rows.tolist()])
    value = delta.dense()
    return value.reshape(value.shape[0] if value.dim() else 1, -1)[rows][:, columns]


def _row(tiler: Tiler, item: Item, slot: int, row: int) -> Tensor:
    """Return one row of a full checkpoint's change."""
    stored, size = item.inputs[slot], _columns(item)
    assert isinstance(stored, Stored) and item.base is not None
    dtype = item.dtype
    value = tiler.raw(stored, row * size, size).to(dtype, copy=True)
    return value - tiler.raw(item.base, row * size, size).to(dtype)
