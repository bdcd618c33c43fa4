"""Finding what each target of an adapter is among the base's tensors on disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from merging.errors import InputError, nearest
from merging.plan.names.conversion import CheckpointLoading
from merging.plan.names.diffusion import DiffusionNames
from merging.plan.names.single_experts import match_single_experts
from merging.sources import Adapter
from merging.sources.changes import Change, LoraChange
from merging.sources.expert_stacks import ExpertsChange
from merging.sources.fused_names import RowRange
from merging.sources.model_config import check_counts
from merging.sources.regions import AssembledChange, Region, TensorPart, meet, part_of, view_region, whole
from merging.sources.renaming import Renaming, find_renaming
from merging.sources.stored import Stored

__all__ = ["Resolved", "Resolver"]

_INPUTS_FIRST = {"gpt_oss", "openai_privacy_filter", "aria", "aria_text"}
"""Models whose experts are stored as ``[E, in, out]`` and say so to PEFT."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """An adapter's ``changes`` by the base's names, and a ``line`` that tells by what rule they were found.

    ``exact``: every target is one tensor of the base, and no target a part of one. ``rows`` are the rows of the base's
    tensors that each target consists of, in order; targets that are no such rows are left out.
    """

    changes: dict[str, Change]
    line: str
    rows: Mapping[str, tuple[RowRange, ...]]
    exact: bool = True


@dataclass(frozen=True, slots=True)
class _Found:
    """For each target, what it is a piece of in memory, and its shape; and the rule it was found by."""

    pieces: Mapping[str, list[TensorPart]]
    shapes: Mapping[str, tuple[int, ...]]
    rule: str


class Resolver:
    """Resolves adapters against the tensors of one base, by their names on disk, and its config.

    ``heads`` are names that adapters gave to some of them: such a head has no other name, whatever prefix the base's
    own tensors have lost or gained.
    """

    def __init__(self, known: Mapping[str, Stored], config: dict[str, Any], heads: Collection[str] = ()) -> None:
        self._known, self._config, self._heads = known, config, heads
        self._shapes = {name: stored.shape for name, stored in known.items()}

    def resolve(self, adapter: Adapter) -> Resolved:
        """The changes of the tensors on disk; one target without a place is an error, never a skip.

        Names on disk are tried, then those that transformers gives the same tensors in memory, and then what it would
        make of the adapter's own names, as of a checkpoint's: older releases' names are loaded so. Raises
        :class:`~merging.errors.InputError`.
        """
        renaming, left = self._match(adapter, self._shapes)
        if not left:
            names = self._renamed(adapter, renaming, self._shapes)
            changes = self._oriented(adapter, {target: self._shapes[name] for target, name in names.items()})
            placed = {names[target]: change for target, change in changes.items()}
            rows = {target: (RowRange(name, 0, (self._shapes[name] or (1,))[0]),) for target, name in names.items()}
            return Resolved(placed, _line(adapter, str(renaming)), rows)
        found = self._by_memory(adapter)
        if found is not None:
            return self._placed(adapter, found, self._pieces)
        single = self._by_single_experts(adapter)
        if single is not None:
            return self._placed(adapter, single, {name: [whole(name, shape)] for name, shape in self._shapes.items()})
        return self._by_spelling(adapter, renaming, left)

    def resolve_in_memory(self, adapter: Adapter) -> Resolved:
        """The changes of the tensors in memory, under their names on disk where they are the same there."""
        renaming, left = self._match(adapter, self._shapes)
        found: _Found | None
        if left:
            found = self._by_memory(adapter)
        else:
            names = self._renamed(adapter, renaming, self._shapes)
            pieces = {t: self._pieces.get(name, [whole(name, self._shapes[name])]) for t, name in names.items()}
            found = _Found(pieces, {t: self._shapes[name] for t, name in names.items()}, str(renaming))
        found = found or self._by_single_experts(adapter)
        if found is not None:
            return self._placed(adapter, found, self._frame)
        return self._by_spelling(adapter, renaming, left)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the base, on disk or in memory."""
        return self._shapes[name] if name in self._shapes else self._in_memory[name]

    def stored(self, name: str) -> Stored | None:
        """A tensor of the base, also one that is a part of a tensor on disk; None for one that lies in several."""
        if name in self._known:
            return self._known[name]
        held = self._holders[name]
        found = meet(held[0][1], whole(name, self._in_memory[name])) if len(held) == 1 else None
        return view_region(self._known[held[0][0]], found[0]) if found else None

    def on_disk(self, name: str) -> str:
        """A tensor on disk that a tensor in memory is, or holds."""
        if name in self._shapes:
            return name
        return self._holders[name][0][0]

    def held(self, name: str) -> list[tuple[str, TensorPart]]:
        """The tensors on disk that hold a tensor in memory, and what each has of it."""
        if name in self._shapes and name not in self._holders:
            return [(name, whole(name, self._shapes[name]))]
        return self._holders[name]

    def _match(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Renaming, list[str]]:
        def fits(target: str, match: str) -> bool:
            return adapter.changes[target].fits(shapes[match])

        required = [t for t, change in adapter.changes.items() if not change.optional and t not in self._heads]
        return find_renaming(required, shapes, fits)

    def _renamed(self, adapter: Adapter, renaming: Renaming, known: Mapping[str, object]) -> dict[str, str]:
        """The name of each target in the base, but for those that it lacks and need not have."""
        names = {t: t if t in self._heads else renaming(t) or t for t in adapter.changes}
        return {target: name for target, name in names.items() if name in known or not adapter.changes[target].optional}

    def _by_spelling(self, adapter: Adapter, renaming: Renaming, left: list[str]) -> Resolved:
        """The changes of a diffusion model's tensors on disk, which are what all programs agree on."""
        spelled = self._diffusion_names.find(adapter)
        if spelled is None:
            raise self._nowhere(adapter, renaming, left)
        found = _Found(spelled.pieces, spelled.shapes, f"the names of {adapter.dialect} files")
        on_disk = {name: [whole(name, shape)] for name, shape in self._shapes.items()}
        return replace(self._placed(adapter, found, on_disk), exact=True)

    @cached_property
    def _diffusion_names(self) -> DiffusionNames:
        return DiffusionNames(self._shapes)

    def _by_single_experts(self, adapter: Adapter) -> _Found | None:
        pieces = match_single_experts(adapter.changes, self._shapes)
        if pieces is None:
            return None
        shapes = {target: adapter.changes[target].shape for target in pieces}
        return _Found(pieces, shapes, "their names in a model whose experts were made layers")

    def _by_memory(self, adapter: Adapter) -> _Found | None:
        if not adapter.dialect.startswith("PEFT"):
            return None  # files of other programs have names of their own
        in_memory = self._in_memory
        renaming, left = self._match(adapter, in_memory)
        if not left:
            names = self._renamed(adapter, renaming, in_memory)
            shapes = {target: in_memory[name] for target, name in names.items()}
            pieces = {target: [whole(name, in_memory[name])] for target, name in names.items()}
            return _Found(pieces, shapes, f"transformers' names, {renaming}")
        if self._loading is None or any(min(change.shape, default=0) < 0 for change in adapter.changes.values()):
            return None
        shapes = {target: change.shape for target, change in adapter.changes.items()}
        pieces = self._loading.pieces(shapes)
        for target, change in adapter.changes.items():
            held = {piece.of for piece in pieces.get(target, ())}
            if not held and change.optional:
                del shapes[target]
                continue
            if not held or not held <= in_memory.keys():
                return None
            name, *others = held
            if not others and pieces[target] == [whole(name, shapes[target])]:  # it has another name, and that is all
                if not change.fits(in_memory[name]):
                    return None
                shapes[target], pieces[target] = in_memory[name], [whole(name, in_memory[name])]
        return _Found(pieces, shapes, "what transformers makes of the names of an older release")

    @cached_property
    def _loading(self) -> CheckpointLoading | None:
        check_counts(self._config, len(self._known))
        return CheckpointLoading.of(self._config)

    @cached_property
    def _pieces(self) -> dict[str, list[TensorPart]]:
        """What each tensor on disk is a piece of in memory."""
        return self._loading.pieces(self._shapes) if self._loading else {}

    @cached_property
    def _in_memory(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in memory, as far as they lie on the disk."""
        ends = {name: [[part.stop for part in piece.box] for _, piece in held] for name, held in self._holders.items()}
        return {name: tuple(map(max, zip(*each, strict=True))) for name, each in ends.items()}

    @cached_property
    def _holders(self) -> dict[str, list[tuple[str, TensorPart]]]:
        """The tensors on disk that hold pieces of each tensor in memory."""
        return _by_whole(self._pieces)

    @cached_property
    def _frame(self) -> dict[str, list[TensorPart]]:
        """The tensors in memory, each whole; by the names on disk of those that are one tensor there, unchanged."""
        alone = {
            pieces[0].of: name
            for name, pieces in self._pieces.items()
            if pieces == [whole(pieces[0].of, self._shapes[name])]
        }
        frame = {alone.get(name, name): [whole(name, shape)] for name, shape in self._in_memory.items()}
        others = {name: [whole(name, shape)] for name, shape in self._shapes.items() if name not in self._pieces}
        return {**others, **frame}

    def _placed(self, adapter: Adapter, found: _Found, places: Mapping[str, list[TensorPart]]) -> Resolved:
        """An adapter's changes of the tensors at ``places``: those that are one target's, parts, and put together."""
        holders = _by_whole(places)
        parts: dict[str, list[tuple[Change, Region]]] = defaultdict(list)
        rows: dict[str, dict[int, RowRange]] = defaultdict(dict)
        exact = True
        for target, change in self._oriented(adapter, found.shapes).items():
            shape, covered = found.shapes[target], 0
            for piece in found.pieces[target]:
                for name, other in holders.get(piece.of, ()):
                    met = meet(piece, other)
                    if met is None:
                        continue
                    part = part_of(change, shape, met[0])
                    if part is None:
                        raise InputError(
                            f"{adapter.path}: {target} is in pieces on the disk ({name} is one), and its change cannot "
                            f"be told piece by piece: save the adapter as a plain LoRA first"
                        )
                    exact &= part is change
                    covered += prod(met[0].shape)
                    parts[name].append((part, met[1]))
                    if _are_rows(met[0], shape) and _are_rows(met[1], self.shape(name)):
                        first, held = met[0].box[0], met[1].box[0]
                        rows[target][first.start] = RowRange(name, held.start, held.stop - held.start)
            if covered != prod(shape):
                raise InputError(
                    f"{adapter.path}: {target} has only {covered} of its {prod(shape)} elements in the base"
                )
        changes = {name: _whole_change(name, self.shape(name), each) for name, each in parts.items()}
        exact &= not any(isinstance(change, AssembledChange) for change in changes.values())
        ordered = {target: tuple(each[first] for first in sorted(each)) for target, each in rows.items()}
        whole_rows = {t: each for t, each in ordered.items() if sum(r.length for r in each) == found.shapes[t][0]}
        return Resolved(changes, _line(adapter, found.rule), whole_rows, exact)

    def _oriented(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
        """The changes, their factors the right way round for targets of these shapes where that is still open.

        Square matrices are turned as all others are where no config says that the model stores ``[in, out]``.
        """
        changes = {target: change for target, change in adapter.changes.items() if target in shapes}
        linear = {t: c for t, c in changes.items() if isinstance(c, LoraChange) and c.kind == "linear"}
        turned = {c.is_transposed(shapes[t]) for t, c in linear.items() if c.shape != c.shape[::-1]}
        if "fan_in_fan_out" not in adapter.config and turned == {True}:
            changes |= {target: replace(change, transposed=True) for target, change in linear.items()}
        inner = self._config.get("text_config") or {}
        inputs_first = not _INPUTS_FIRST.isdisjoint((self._config.get("model_type"), inner.get("model_type")))
        for target, change in changes.items():
            if isinstance(change, ExpertsChange):
                changes[target] = change.with_orientation(shapes[target], inputs_first)
        return changes

    def _nowhere(self, adapter: Adapter, renaming: Renaming, left: list[str]) -> InputError:
        target, known = left[0], self._known
        match = renaming(target)
        # A name in memory tells more than one on the disk that only looks like it.
        names = [name for name in (match, target) if name is not None and (name in known or name in self._in_memory)]
        if names:
            shape = adapter.changes[target].shape
            reason = f"has the shape {shape}, and the base's tensor {tuple(self.shape(names[0]))}"
        else:
            reason = f"is no tensor of the base{nearest(target, known) if len(known) < 5000 else ''}"
        return InputError(
            f"{adapter.path}: {target} {reason} ({len(left)} of {len(adapter.changes)} targets have no place): is this "
            f"the base it was trained on{f' ({adapter.base})' if adapter.base else ''}?"
        )


def _are_rows(place: Region, shape: tuple[int, ...]) -> bool:
    """Whether what lies at a place of a tensor of this shape is some of its rows."""
    return place.axes == tuple(range(len(shape))) and bool(shape) and place.shape[1:] == shape[1:]


def _by_whole(pieces: Mapping[str, list[TensorPart]]) -> dict[str, list[tuple[str, TensorPart]]]:
    """Which tensors hold pieces of each larger one."""
    holders: dict[str, list[tuple[str, TensorPart]]] = defaultdict(list)
    for name, each in pieces.items():
        for piece in each:
            holders[piece.of].append((name, piece))
    return dict(holders)


def _line(adapter: Adapter, rule: str) -> str:
    return f"{adapter.path}: {len(adapter.changes)} of {len(adapter.changes)} targets matched by {rule}"


def _whole_change(name: str, shape: tuple[int, ...], parts: list[tuple[Change, Region]]) -> Change:
    """The change of a tensor, made of what changes its parts."""
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
