"""Changes of an adapter's targets, made into changes of the tensors that hold the targets' elements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from merging.errors import InputError
from merging.maths.shapes import Shape
from merging.sources import Adapter
from merging.sources.changes import Change
from merging.sources.fused_names import RowRange
from merging.sources.regions import AssembledChange, Region, TensorPart, meet, part_of

__all__ = ["Match", "Resolved", "match_line", "parts_by_whole", "place_changes"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The changes of an adapter by the base's names.

    Attributes:
        changes: the change of each tensor of the base.
        line: a line about the rule by which names were matched.
        rows: the rows of the base's tensors that each target consists of, in order; targets that are no such rows are
            left out.
        exact: whether every target is one whole tensor of the base.
    """

    changes: dict[str, Change]
    line: str
    rows: Mapping[str, tuple[RowRange, ...]]
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Match:
    """The parts of tensors in memory that each target is, the targets' shapes, and the rule of the match."""

    pieces: Mapping[str, list[TensorPart]]
    shapes: Mapping[str, Shape]
    rule: str


def place_changes(
    adapter: Adapter,
    changes: Mapping[str, Change],
    found: Match,
    places: Mapping[str, list[TensorPart]],
    shape_of: Callable[[str], Shape],
) -> Resolved:
    """Turn the changes of targets into changes of the tensors at ``places``.

    Args:
        adapter: the adapter.
        changes: its changes by target, oriented as the base's tensors are.
        found: the parts that the targets are.
        places: the parts that each tensor of the base is.
        shape_of: returns the shape of a tensor of the base.

    Raises:
        InputError: for a target that the base does not hold in full, or whose change cannot be cut into pieces.
    """
    holders = parts_by_whole(places)
    parts: dict[str, list[tuple[Change, Region]]] = defaultdict(list)
    rows: dict[str, dict[int, RowRange]] = defaultdict(dict)
    exact = True
    for target, change in changes.items():
        shape, covered = found.shapes[target], 0
        for piece in found.pieces[target]:
            for name, other in holders.get(piece.of, ()):
                met = meet(piece, other)
                if met is None:
                    continue
                part = part_of(change, shape, met[0])
                if part is None:
                    raise InputError(
                        f"{adapter.path}: {target} is in pieces on the disk ({name} is one), and its change cannot be "
                        f"cut into pieces: save the adapter as a plain LoRA first"
                    )
                exact &= part is change
                covered += prod(met[0].shape)
                parts[name].append((part, met[1]))
                if _are_rows(met[0], shape) and _are_rows(met[1], shape_of(name)):
                    first, held = met[0].box[0], met[1].box[0]
                    rows[target][first.start] = RowRange(name, held.start, held.stop - held.start)
        if covered != prod(shape):
            raise InputError(f"{adapter.path}: {target} has only {covered} of its {prod(shape)} elements in the base")
    placed = {name: _join_parts(name, shape_of(name), each) for name, each in parts.items()}
    exact &= not any(isinstance(change, AssembledChange) for change in placed.values())
    ordered = {target: tuple(each[first] for first in sorted(each)) for target, each in rows.items()}
    in_rows = {t: each for t, each in ordered.items() if sum(r.length for r in each) == found.shapes[t][0]}
    return Resolved(placed, match_line(adapter, found.rule), in_rows, exact)


def _are_rows(region: Region, shape: Shape) -> bool:
    """Return whether a region of a tensor of this shape consists of whole rows."""
    return region.axes == tuple(range(len(shape))) and bool(shape) and region.shape[1:] == shape[1:]


def parts_by_whole(pieces: Mapping[str, list[TensorPart]]) -> dict[str, list[tuple[str, TensorPart]]]:
    """Return the tensors that hold parts of each larger one."""
    holders: dict[str, list[tuple[str, TensorPart]]] = defaultdict(list)
    for name, each in pieces.items():
        for piece in each:
            holders[piece.of].append((name, piece))
    return dict(holders)


def match_line(adapter: Adapter, rule: str) -> str:
    """Return the line about the rule by which an adapter's names were matched."""
    return f"{adapter.path}: {len(adapter.changes)} of {len(adapter.changes)} targets matched by {rule}"


def _join_parts(name: str, shape: tuple[int, ...], parts: list[tuple[Change, Region]]) -> Change:
    """Return the change of a tensor, made of the changes of its parts."""
    first, place = parts[0]
    if len(parts) == 1 and place.fills(shape):
        return first
    kinds = {change.kind for change, _ in parts}
    if all(change.low_rank for change, _ in parts):
        kind = "experts" if "experts" in kinds or len(place.box) > len(place.axes) else first.kind
    else:
        kind = "bias" if kinds == {"bias"} else "full"
    reason = next((change.needs_base for change, _ in parts if change.needs_base), None)
    return AssembledChange(name, kind, shape, tuple(parts), needs_base=reason)
