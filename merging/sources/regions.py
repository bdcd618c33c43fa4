"""Changes of a part of a tensor, and changes assembled from several parts: experts, fused projections.

A part of a change is again a change of its kind, on views of the adapter's tensors. :class:`AssembledChange` combines
the changes that several modules make to one tensor. Readers of changes need not know the layout of the base on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.changes import Change, FullChange, LoraChange
from merging.sources.expert_stacks import ExpertsChange
from merging.sources.stored import Stored
from merging.sources.tensor_views import View, view

__all__ = ["AssembledChange", "Box", "Region", "RegionChange", "TensorPart", "meet", "part_of", "view_region", "whole"]

Box = tuple[slice, ...]
"""A range of each axis of a tensor."""


@dataclass(frozen=True, slots=True)
class Region:
    """The region of a tensor within a larger tensor.

    Attributes:
        box: The range of each axis of the larger tensor.
        axes: The axes of the larger tensor that the tensor's own axes run along, in order. Every other axis contributes
            one entry (an expert).
    """

    box: Box
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the region."""
        return tuple(_length(self.box[axis]) for axis in self.axes)

    def fills(self, shape: tuple[int, ...]) -> bool:
        """Whether it covers a whole tensor of this shape, with its axes in order."""
        return self.axes == tuple(range(len(shape))) and self.shape == shape


@dataclass(frozen=True, slots=True)
class TensorPart:
    """The part of a tensor that comes from a larger tensor, ``of``: the range ``box`` of the larger tensor.

    The tensor's axis ``k`` runs along the axis ``axes[k]`` of the larger tensor, and the box begins at ``start[k]`` of
    it.
    """

    of: str
    box: Box
    axes: tuple[int, ...]
    start: tuple[int, ...]


def whole(name: str, shape: tuple[int, ...]) -> TensorPart:
    """Return the part that is all of a tensor."""
    return TensorPart(name, tuple(slice(0, size) for size in shape), tuple(range(len(shape))), (0,) * len(shape))


def meet(one: TensorPart, other: TensorPart) -> tuple[Region, Region] | None:
    """Return the regions of two tensors that hold their shared part, or None. Axes are in the order of ``other``'s.

    Both are parts of one larger tensor.
    """
    box = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one.box, other.box, strict=True))
    if any(_length(each) <= 0 for each in box):
        return None
    shared = [axis for axis in other.axes if axis in one.axes]
    boxes = [
        tuple(
            slice(start + box[axis].start - piece.box[axis].start, start + box[axis].stop - piece.box[axis].start)
            for axis, start in zip(piece.axes, piece.start, strict=True)
        )
        for piece in (one, other)
    ]
    axes = [tuple(piece.axes.index(axis) for axis in shared) for piece in (one, other)]
    return Region(boxes[0], axes[0]), Region(boxes[1], axes[1])


def part_of(change: Change, shape: tuple[int, ...], region: Region) -> Change | None:
    """Return the change of the part of a tensor at ``region``; ``shape`` is the shape of the whole tensor.

    None if the part alone does not determine it, as with PiSSA.
    """
    if region.fills(shape):
        return change
    if isinstance(change, FullChange):
        return replace(change, value=view_region(view(change.value, *shape), region))
    if isinstance(change, LoraChange) and change.kind in ("linear", "experts"):
        return _part_of_lora(change, shape, region)
    if isinstance(change, LoraChange) and change.kind == "conv" and region.shape[1:] == shape[1:]:
        return replace(change, up=_along(change.up, 0, region.box[0]))
    if not change.needs_base and not isinstance(change, LoraChange):
        return RegionChange(change.target, change.kind, change, shape, region)
    return None


def _part_of_lora(change: LoraChange, shape: tuple[int, ...], region: Region) -> Change | None:
    turned = change.is_transposed(shape)
    rows, columns = region.box[-2:][::-1] if turned else region.box[-2:]
    wide = _length(columns) == change.down.shape[-1]
    if change.start or change.layer or (change.magnitude is not None and not wide):
        return None
    up, down = _along(change.up, -2, rows), _along(change.down, -1, columns)
    magnitude = change.magnitude and _along(view(change.magnitude, change.magnitude.numel), 0, rows)
    matrix = [axis - len(shape) for axis in region.axes][-2:]
    turned ^= matrix == [-1, -2]
    if isinstance(change, ExpertsChange):
        up, down = (_along(each, 0, region.box[0]) for each in (up, down))
        if 0 not in region.axes:
            up, down = up.select(0), down.select(0)
            return LoraChange(change.target, "linear", down, up, change.scale, transposed=turned)
    return replace(change, up=up, down=down, magnitude=magnitude, transposed=turned)


def _along(stored: Stored, axis: int, kept: slice) -> View:
    return view(stored).narrow(axis % len(stored.shape), kept.start, _length(kept))


def view_region(stored: Stored, region: Region) -> View:
    """Return a view of a region of a stored tensor."""
    part = view(stored)
    for axis, kept in enumerate(region.box):
        part = part.narrow(axis, kept.start, _length(kept))
    gone = [axis for axis in range(len(region.box)) if axis not in region.axes]
    part = part.permute(*gone, *region.axes)
    for _ in gone:
        part = part.select(0)
    return part


@dataclass(frozen=True, slots=True, eq=False)
class RegionChange(Change):
    """The part at ``region`` of a change ``of`` a tensor of a ``size``, which is computed as a whole and then cut."""

    of: Change
    size: tuple[int, ...]
    region: Region

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return self.of.tensors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.region.shape

    @property
    def rank(self) -> int:
        return self.of.rank

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self.of.is_transposed(self.size)

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        value = self.of.read(self.size, base, dtype).dense()[self.region.box]
        gone = [axis for axis in range(value.dim()) if axis not in self.region.axes]
        return Dense(value.permute(*gone, *self.region.axes).reshape(shape))


@dataclass(frozen=True, slots=True, eq=False)
class AssembledChange(Change):
    """The change of a whole tensor of a shape, assembled from ``parts``: changes with their regions."""

    size: tuple[int, ...]
    parts: tuple[tuple[Change, Region], ...]

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return tuple(tensor for change, _ in self.parts for tensor in change.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def low_rank(self) -> bool:
        return all(change.low_rank for change, _ in self.parts)

    @property
    def rank(self) -> int:
        """The sum of the parts' ranks; for experts, the largest sum of any expert."""
        return self._rank_starts([change.rank for change, _ in self.parts])[1]

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        change, region = self.parts[0]
        return change.is_transposed(region.shape)

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        deltas = [
            change.read(region.shape, lambda region=region: base()[region.box].reshape(region.shape), dtype)  # type: ignore[misc]
            for change, region in self.parts
        ]
        low = [delta for delta in deltas if isinstance(delta, LowRank)]
        if len(low) == len(deltas):
            return self._factors([each.oriented(low[0].transposed) for each in low])
        value = torch.zeros(shape, dtype=dtype)
        for delta, (_, region) in zip(deltas, self.parts, strict=True):
            piece = value[region.box]
            piece.copy_(delta.dense().reshape(piece.shape))
        return Dense(value)

    def _factors(self, deltas: list[LowRank]) -> LowRank:
        """Return the parts' factors, concatenated along the rank, in their rows and columns; zeros elsewhere."""
        starts, rank = self._rank_starts([delta.rank for delta in deltas])
        batch = self.size[:1] if self.kind == "experts" else ()
        first, *rest = self.size[len(batch) :]
        turned = deltas[0].transposed
        out, inputs = (prod(rest), first) if turned else (first, prod(rest))
        up, down = deltas[0].up.new_zeros(*batch, out, rank), deltas[0].down.new_zeros(*batch, rank, inputs)
        for delta, (_, region), start in zip(deltas, self.parts, starts, strict=True):
            box = region.box[len(batch) :]
            rows, columns = (box[1], box[0]) if turned else (box[0], box[1] if len(box) == 2 else slice(None))
            terms = slice(start, start + delta.rank)
            up[(*region.box[: len(batch)], rows, terms)] = delta.up
            down[(*region.box[: len(batch)], terms, columns)] = delta.down
        return LowRank(up, down, self.size, turned)

    def _rank_starts(self, ranks: list[int]) -> tuple[list[int], int]:
        """Return the start of each part along the rank, and the total rank; parts of different experts share ranks."""
        taken = [0] * (self.size[0] if self.kind == "experts" else 1)
        starts = []
        for rank, (_, region) in zip(ranks, self.parts, strict=True):
            experts = region.box[0] if self.kind == "experts" else slice(0, 1)
            start = max(taken[experts])
            starts.append(start)
            taken[experts] = [start + rank] * _length(experts)
        return starts, max(taken)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
