"""Maps of elements: where the elements of tensors are after stacking, joining, dividing and transposing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from merging.sources.regions import TensorPart, whole

__all__ = ["ElementMap"]


@dataclass(frozen=True, slots=True)
class ElementMap:
    """A tensor that consists of ``pieces``: for each source tensor by name, the part that it is of this one."""

    shape: tuple[int, ...]
    pieces: Mapping[str, TensorPart]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> ElementMap:
        """Return the map of a tensor as it is."""
        return cls(shape, {name: whole(name, shape)})

    def shift(self, axis: int, by: int) -> ElementMap:
        """Return the map with all pieces moved along an axis, to be joined with others."""
        return ElementMap(self.shape, {name: _shift(piece, axis, by) for name, piece in self.pieces.items()})

    def crop(self, axis: int, start: int, stop: int) -> ElementMap:
        """Return the entries of an axis from ``start`` to ``stop``, and the pieces in them."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        pieces = {name: _crop(piece, axis, start, stop) for name, piece in self.pieces.items()}
        return ElementMap(shape, {name: piece for name, piece in pieces.items() if piece.box[axis].stop > 0})

    def swap_axes(self, one: int, other: int) -> ElementMap:
        """Return the map with two axes swapped."""
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
    """Return the rest of a piece between ``start`` and ``stop``, counted from ``start``.

    A box that ends at 0 or before holds nothing.
    """
    kept = piece.box[axis]
    first, last = max(kept.start, start), min(kept.stop, stop)
    skipped = tuple(
        begin + (first - kept.start if along == axis else 0)
        for along, begin in zip(piece.axes, piece.start, strict=True)
    )
    box = (*piece.box[:axis], slice(first - start, last - start if last > first else 0), *piece.box[axis + 1 :])
    return replace(piece, box=box, start=skipped)
