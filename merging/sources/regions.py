"""Changes of a part of a tensor, and of tensors whose change is put together of several: experts, fused projections.

A part of a change is again a change of its kind, on views of the adapter's tensors; what several adapters' modules
change in one tensor is :class:`AssembledChange`. So whoever reads changes need not know how the base lies on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from merging.maths.delta import Delta, Dense, LowRank
from merging.sources.adapter import Change, FullChange, LoraChange
from merging.sources.expert_stacks import ExpertsChange
from merging.sources.stored import Stored
from merging.sources.tensor_views import View, view

__all__ = ["AssembledChange", "Box", "Region", "RegionChange", "TensorPart", "meet", "part_of", "view_region", "whole"]

Box = tuple[slice, ...]
"""What is meant of each axis of a tensor."""


@dataclass(frozen=True, slots=True)
class Region:
    """Where a tensor lies in a larger one: ``box`` is what it takes of each axis of the larger one, and ``axes`` are
    those axes that its own run along, in order. Of any other axis it takes one entry (an expert).
    """

    box: Box
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what lies there."""
        return tuple(_length(self.box[axis]) for axis in self.axes)

    def fills(self, shape: tuple[int, ...]) -> bool:
        """Whether it is all of a tensor of this shape, as it is."""
        return self.axes == tuple(range(len(shape))) and self.shape == shape


@dataclass(frozen=True, slots=True)
class TensorPart:
    """What a tensor has in common with a larger one, ``of``: that one's ``box``.

    The tensor's axis ``k`` runs along the axis ``axes[k]`` of the larger one, and the box begins at its ``start[k]``.
    """

    of: str
    box: Box
    axes: tuple[int, ...]
    start: tuple[int, ...]


def whole(name: str, shape: tuple[int, ...]) -> TensorPart:
    """The piece that is all of a tensor."""
    return TensorPart(name, tuple(slice(0, size) for size in shape), tuple(range(len(shape))), (0,) * len(shape))


def meet(one: TensorPart, other: TensorPart) -> tuple[Region, Region] | None:
    """Where what two pieces of one tensor share lies in each of their tensors, its axes in the order of the other's.

    None if they share nothing.
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


def part_of(change: Change, shape: tuple[int, ...], place: Region) -> Change | None:
    """What a change of a tensor of this shape changes in the part at ``place``.

    None where that cannot be told of the part alone, as with PiSSA of a part.
    """
    if place.fills(shape):
        return change
    if isinstance(change, FullChange):
        return replace(change, value=view_region(view(change.value, *shape), place))
    if isinstance(change, LoraChange) and change.kind in ("linear", "experts"):
        return _part_of_lora(change, shape, place)
    if isinstance(change, LoraChange) and change.kind == "conv" and place.shape[1:] == shape[1:]:
        return replace(change, up=_along(change.up, 0, place.box[0]))
    if not change.needs_base and not isinstance(change, LoraChange):
        return RegionChange(change.target, change.kind, change, shape, place)
    return None


def _part_of_lora(change: LoraChange, shape: tuple[int, ...], place: Region) -> Change | None:
    turned = change.is_transposed(shape)
    rows, columns = place.box[-2:][::-1] if turned else place.box[-2:]
    wide = _length(columns) == change.down.shape[-1]
    if change.start or change.layer or (change.magnitude is not None and not wide):
        return None
    up, down = _along(change.up, -2, rows), _along(change.down, -1, columns)
    magnitude = change.magnitude and _along(view(change.magnitude, change.magnitude.numel), 0, rows)
    matrix = [axis - len(shape) for axis in place.axes][-2:]
    turned ^= matrix == [-1, -2]
    if isinstance(change, ExpertsChange):
        up, down = (_along(each, 0, place.box[0]) for each in (up, down))
        if 0 not in place.axes:
            up, down = up.select(0), down.select(0)
            return LoraChange(change.target, "linear", down, up, change.scale, turned)
    return replace(change, up=up, down=down, magnitude=magnitude, transposed=turned)


def _along(stored: Stored, axis: int, kept: slice) -> View:
    return view(stored).narrow(axis % len(stored.shape), kept.start, _length(kept))


def view_region(stored: Stored, place: Region) -> View:
    """The part of a stored tensor at a place."""
    view = view(stored)
    for axis, kept in enumerate(place.box):
        view = view.narrow(axis, kept.start, _length(kept))
    gone = [axis for axis in range(len(place.box)) if axis not in place.axes]
    view = view.permute(*gone, *place.axes)
    for _ in gone:
        view = view.select(0)
    return view


@dataclass(frozen=True, slots=True, eq=False)
class RegionChange(Change):
    """The part at ``place`` of a change ``of`` a tensor of a ``size``, which is computed as a whole and then cut."""

    of: Change
    size: tuple[int, ...]
    place: Region

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return self.of.tensors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def rank(self) -> int:
        return self.of.rank

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self.of.is_transposed(self.size)

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        value = self.of.read(self.size, base, dtype).dense()[self.place.box]
        gone = [axis for axis in range(value.dim()) if axis not in self.place.axes]
        return Dense(value.permute(*gone, *self.place.axes).reshape(shape))


@dataclass(frozen=True, slots=True, eq=False)
class AssembledChange(Change):
    """What changes of parts make of a whole tensor of a shape; ``parts`` are the changes, each with its place."""

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
        """The sum of the parts' ranks; of the parts of one expert, where it is largest."""
        return self._rank_starts([change.rank for change, _ in self.parts])[1]

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        change, place = self.parts[0]
        return change.is_transposed(place.shape)

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        deltas = [
            change.read(place.shape, lambda place=place: base()[place.box].reshape(place.shape), dtype)  # type: ignore[misc]
            for change, place in self.parts
        ]
        low = [delta for delta in deltas if isinstance(delta, LowRank)]
        if len(low) == len(deltas):
            return self._factors([each.oriented(low[0].transposed) for each in low])
        value = torch.zeros(shape, dtype=dtype)
        for delta, (_, place) in zip(deltas, self.parts, strict=True):
            piece = value[place.box]
            piece.copy_(delta.dense().reshape(piece.shape))
        return Dense(value)

    def _factors(self, deltas: list[LowRank]) -> LowRank:
        """The parts' factors side by side in the rank, each in its rows and columns, and zeros elsewhere."""
        starts, rank = self._rank_starts([delta.rank for delta in deltas])
        batch = self.size[:1] if self.kind == "experts" else ()
        first, *rest = self.size[len(batch) :]
        turned = deltas[0].transposed
        out, inputs = (prod(rest), first) if turned else (first, prod(rest))
        up, down = deltas[0].up.new_zeros(*batch, out, rank), deltas[0].down.new_zeros(*batch, rank, inputs)
        for delta, (_, place), start in zip(deltas, self.parts, starts, strict=True):
            box = place.box[len(batch) :]
            rows, columns = (box[1], box[0]) if turned else (box[0], box[1] if len(box) == 2 else slice(None))
            terms = slice(start, start + delta.rank)
            up[(*place.box[: len(batch)], rows, terms)] = delta.up
            down[(*place.box[: len(batch)], terms, columns)] = delta.down
        return LowRank(up, down, self.size, turned)

    def _rank_starts(self, ranks: list[int]) -> tuple[list[int], int]:
        """Where in the rank each part begins, and the rank of all; parts of different experts lie side by side."""
        taken = [0] * (self.size[0] if self.kind == "experts" else 1)
        starts = []
        for rank, (_, place) in zip(ranks, self.parts, strict=True):
            experts = place.box[0] if self.kind == "experts" else slice(0, 1)
            start = max(taken[experts])
            starts.append(start)
            taken[experts] = [start + rank] * _length(experts)
        return starts, max(taken)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
