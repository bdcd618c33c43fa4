"""Resolving the targets of an adapter to tensors of the base on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from merging.errors import InputError, nearest, option
from merging.plan.names.conversion import CheckpointLoading
from merging.plan.names.diffusion import DiffusionNames, name_families
from merging.plan.names.placement import Match, Resolved, match_line, parts_by_whole, place_changes
from merging.plan.names.single_experts import match_single_experts
from merging.plan.names.towers import match_towers
from merging.sources import Adapter
from merging.sources.changes import Change, LoraChange
from merging.sources.expert_stacks import ExpertsChange
from merging.sources.fused_names import RowRange
from merging.sources.model_config import check_counts
from merging.sources.regions import TensorPart, meet, view_region, whole
from merging.sources.renaming import Renaming, find_renaming
from merging.sources.stored import Stored

__all__ = ["Resolver"]

_INPUTS_FIRST = {"gpt_oss", "openai_privacy_filter", "aria", "aria_text"}
"""Models whose experts are stored as ``[E, in, out]`` and say so to PEFT."""


class Resolver:
    """Resolves adapters against the tensors of one base, by their names on disk, and its config.

    ``heads`` are names that adapters gave to some of them: such a head has no other name, whatever prefix the base's
    own tensors have lost or gained.
    """

    def __init__(self, known: Mapping[str, Stored], config: dict[str, Any], heads: Collection[str] = ()) -> None:
        self._known, self._config, self._heads = known, config, heads
        self._shapes = {name: stored.shape for name, stored in known.items()}

    def resolve(self, adapter: Adapter) -> Resolved:
        """Return the changes of the tensors on disk; a target without a place is an error.

        Names on disk are tried first, then the names that transformers gives the same tensors in memory, and then its
        names for the adapter's own, as for a checkpoint of an older release. Raises
        :class:`~merging.errors.InputError`.
        """
        renaming, left = self._match(adapter, self._shapes)
        if not left:
            names = self._rename_targets(adapter, renaming, self._shapes)
            changes = self._orient(adapter, {target: self._shapes[name] for target, name in names.items()})
            placed = {names[target]: change for target, change in changes.items()}
            rows = {target: (RowRange(name, 0, (self._shapes[name] or (1,))[0]),) for target, name in names.items()}
            return Resolved(placed, match_line(adapter, str(renaming)), rows)
        found = self._by_memory(adapter)
        if found is not None:
            return self._place(adapter, found, self._pieces)
        on_disk = {name: [whole(name, shape)] for name, shape in self._shapes.items()}
        for match, places in ((self._by_single_experts, on_disk), (self._by_towers, self._pieces or on_disk)):
            found = match(adapter)
            if found is not None:
                return self._place(adapter, found, places)
        return self._by_spelling(adapter, renaming, left)

    def resolve_in_memory(self, adapter: Adapter) -> Resolved:
        """Return the changes of the tensors in memory, under their names on disk where they are the same there."""
        renaming, left = self._match(adapter, self._shapes)
        found: Match | None
        if left:
            found = self._by_memory(adapter)
        else:
            names = self._rename_targets(adapter, renaming, self._shapes)
            pieces = {t: self._pieces.get(name, [whole(name, self._shapes[name])]) for t, name in names.items()}
            found = Match(pieces, {t: self._shapes[name] for t, name in names.items()}, str(renaming))
        found = found or self._by_single_experts(adapter) or self._by_towers(adapter)
        if found is not None:
            return self._place(adapter, found, self._frame)
        return self._by_spelling(adapter, renaming, left)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the base, on disk or in memory."""
        return self._shapes[name] if name in self._shapes else self._in_memory[name]

    def find_stored(self, name: str) -> Stored | None:
        """Return a tensor of the base, also a part of a tensor on disk; None for one that lies in several."""
        if name in self._known:
            return self._known[name]
        held = self._holders[name]
        found = meet(held[0][1], whole(name, self._in_memory[name])) if len(held) == 1 else None
        return view_region(self._known[held[0][0]], found[0]) if found else None

    def on_disk(self, name: str) -> str:
        """Return a tensor on disk that is, or is a part of, a tensor in memory."""
        if name in self._shapes:
            return name
        return self._holders[name][0][0]

    def in_memory(self, name: str) -> str | None:
        """Return the name in memory of a tensor on disk, None where it is only a part of a tensor in memory.

        It is the name on disk where no rules of transformers for the model are known.
        """
        pieces = self._pieces.get(name)
        if pieces is None:
            return name
        return pieces[0].of if pieces == [whole(pieces[0].of, self._shapes[name])] else None

    @property
    def inputs_first(self) -> bool:
        """Whether the model stores its experts as ``[E, in, out]``."""
        inner = self._config.get("text_config") or {}
        return not _INPUTS_FIRST.isdisjoint((self._config.get("model_type"), inner.get("model_type")))

    def holders(self, name: str) -> list[tuple[str, TensorPart]]:
        """Return the tensors on disk that hold a tensor in memory, and the part that each holds."""
        if name in self._shapes and name not in self._holders:
            return [(name, whole(name, self._shapes[name]))]
        return self._holders[name]

    def _match(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Renaming, list[str]]:
        def fits(target: str, match: str) -> bool:
            return adapter.changes[target].fits(shapes[match])

        required = [t for t, change in adapter.changes.items() if not change.optional and t not in self._heads]
        return find_renaming(required, shapes, fits)

    def _rename_targets(self, adapter: Adapter, renaming: Renaming, known: Mapping[str, object]) -> dict[str, str]:
        """Return the name of each target in the base, without targets that it lacks and need not have."""
        names = {t: t if t in self._heads else renaming(t) or t for t in adapter.changes}
        return {target: name for target, name in names.items() if name in known or not adapter.changes[target].optional}

    def _by_spelling(self, adapter: Adapter, renaming: Renaming, left: list[str]) -> Resolved:
        """Return the changes of a diffusion model's tensors on disk, on which all programs agree."""
        spelled = self._diffusion_names.find(adapter)
        if spelled is None:
            raise self._nowhere(adapter, renaming, left)
        rule = f"the names of {adapter.dialect} files"
        if self._diffusion_names.undecided(adapter):
            rule += f", in transformer; for the other of the two use {option('components', 'transformer_2')}"
        found = Match(spelled.pieces, spelled.shapes, rule)
        on_disk = {name: [whole(name, shape)] for name, shape in self._shapes.items()}
        return replace(self._place(adapter, found, on_disk), exact=True)

    @cached_property
    def _diffusion_names(self) -> DiffusionNames:
        return DiffusionNames(self._shapes)

    def _by_single_experts(self, adapter: Adapter) -> Match | None:
        pieces = match_single_experts(adapter.changes, self._shapes)
        if pieces is None:
            return None
        shapes = {target: adapter.changes[target].shape for target in pieces}
        return Match(pieces, shapes, "their names in a model whose experts were made layers")

    def _by_towers(self, adapter: Adapter) -> Match | None:
        return match_towers(adapter, self._in_memory or self._shapes)

    def _by_memory(self, adapter: Adapter) -> Match | None:
        if not adapter.names_modules:
            return None  # files of other programs have names of their own
        in_memory = self._in_memory
        renaming, left = self._match(adapter, in_memory)
        if not left:
            names = self._rename_targets(adapter, renaming, in_memory)
            shapes = {target: in_memory[name] for target, name in names.items()}
            pieces = {target: [whole(name, in_memory[name])] for target, name in names.items()}
            return Match(pieces, shapes, f"transformers' names, {renaming}")
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
        return Match(pieces, shapes, "what transformers makes of the names of an older release")

    @cached_property
    def _loading(self) -> CheckpointLoading | None:
        check_counts(self._config, len(self._known))
        return CheckpointLoading.of(self._config)

    @cached_property
    def _pieces(self) -> dict[str, list[TensorPart]]:
        """The parts that each tensor on disk is in memory."""
        return self._loading.pieces(self._shapes) if self._loading else {}

    @cached_property
    def _in_memory(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in memory, as far as they are on the disk."""
        ends = {name: [[part.stop for part in piece.box] for _, piece in held] for name, held in self._holders.items()}
        return {name: tuple(map(max, zip(*each, strict=True))) for name, each in ends.items()}

    @cached_property
    def _holders(self) -> dict[str, list[tuple[str, TensorPart]]]:
        """The tensors on disk that hold parts of each tensor in memory."""
        return parts_by_whole(self._pieces)

    @cached_property
    def _frame(self) -> dict[str, list[TensorPart]]:
        """The tensors in memory, each whole; by their names on disk where they are one tensor there, unchanged."""
        alone = {
            pieces[0].of: name
            for name, pieces in self._pieces.items()
            if pieces == [whole(pieces[0].of, self._shapes[name])]
        }
        frame = {alone.get(name, name): [whole(name, shape)] for name, shape in self._in_memory.items()}
        others = {name: [whole(name, shape)] for name, shape in self._shapes.items() if name not in self._pieces}
        return {**others, **frame}

    def _place(self, adapter: Adapter, found: Match, places: Mapping[str, list[TensorPart]]) -> Resolved:
        """Return an adapter's changes of the tensors at ``places``."""
        return place_changes(adapter, self._orient(adapter, found.shapes), found, places, self.shape)

    def _orient(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
        """Return the changes, their factors the right way round for targets of these shapes where that is open.

        Square matrices are turned as all others are, where no config says that the model stores ``[in, out]``.
        """
        changes = {target: change for target, change in adapter.changes.items() if target in shapes}
        linear = {t: c for t, c in changes.items() if isinstance(c, LoraChange) and c.kind == "linear"}
        turned = {c.is_transposed(shapes[t]) for t, c in linear.items() if c.shape != c.shape[::-1]}
        if "fan_in_fan_out" not in adapter.config and turned == {True}:
            changes |= {target: replace(change, transposed=True) for target, change in linear.items()}
        for target, change in changes.items():
            if isinstance(change, ExpertsChange):
                changes[target] = change.with_orientation(shapes[target], self.inputs_first)
        return changes

    def _nowhere(self, adapter: Adapter, renaming: Renaming, left: list[str]) -> InputError:
        target, known = left[0], self._known
        match = renaming(target)
        # A name in memory is a better hint than a name on the disk that only looks like it.
        names = [name for name in (match, target) if name is not None and (name in known or name in self._in_memory)]
        if names:
            shape = adapter.changes[target].shape
            reason = f"has the shape {shape}, and the base's tensor {tuple(self.shape(names[0]))}"
        else:
            reason = f"is not a tensor of the base{nearest(target, known) if len(known) < 5000 else ''}"
        return InputError(
            f"{adapter.path}: {target} {reason} ({len(left)} of {len(adapter.changes)} targets have no place): is this "
            f"the base it was trained on{f' ({adapter.base})' if adapter.base else ''}?"
            f"{name_families(adapter, self._shapes)}"
        )
