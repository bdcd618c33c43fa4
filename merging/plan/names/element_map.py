"""Following which elements of which tensor end up where, while tensors are stacked, joined, divided and transposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from merging.sources.regions import TensorPart, whole

__all__ = ["ElementMap"]


@dataclass(frozen=True, slots=True)
class ElementMap:
    """A tensor that is laid out of ``pieces``, each the piece that the tensor of that name is of it."""

    shape: tuple[int, ...]
    pieces: Mapping[str, TensorPart]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> ElementMap:
        """A tensor as it is."""
        return cls(shape, {name: whole(name, shape)})

    def shift(self, axis: int, by: int) -> ElementMap:
        """The same, to be put into a larger tensor so far along an axis."""
        return ElementMap(self.shape, {name: _shift(piece, axis, by) for name, piece in self.pieces.items()})

    def crop(self, axis: int, start: int, stop: int) -> ElementMap:
        """The entries of an axis from ``start`` to ``stop``, and the pieces they are made of."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        pieces = {name: _crop(piece, axis, start, stop) for name, piece in self.pieces.items()}
        return ElementMap(shape, {name: piece for name, piece in pieces.items() if piece.box[axis].stop > 0})

    def swap_axes(self, one: int, other: int) -> ElementMap:
        """The same with two axes in each other's place."""
        order = list(range(len(self.shape)))
        order[one], order[other] = order[other], order[one]
        shape = tuple(self.shape[axis] for axis in order)
        pieces = {
            name: replace(
                piece,
                box=tuple(piece.box[axis] for axis in order),
                axes=tuple(order.index(axis) for axis in piece.axes),
            )
            for name, piece in self.pieces.items()
        }
        return ElementMap(shape, pieces)


def _shift(piece: TensorPart, axis: int, by: int) -> TensorPart:
    kept = piece.box[axis]
    box = (*piece.box[:axis], slice(kept.start + by, kept.stop + by), *piece.box[axis + 1 :])
    return replace(piece, box=box)


def _crop(piece: TensorPart, axis: int, start: int, stop: int) -> TensorPart:
    """What is left of a piece between ``start`` and ``stop``, counted from there; a box that ends at 0 or before holds
    nothing."""
    kept = piece.box[axis]
    first, last = max(kept.start, start), min(kept.stop, stop)
    skipped = tuple(
        begin + (first - kept.start if along == axis else 0)
        for along, begin in zip(piece.axes, piece.start, strict=True)
    )
    box = (*piece.box[:axis], slice(first - start, last - start if last > first else 0), *piece.box[axis + 1 :])
    return replace(piece, box=box, start=skipped)
