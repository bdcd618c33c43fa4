"""Matching the targets of a diffusion model's LoRA with the tensors of a base, whatever names the two have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merging.errors import InputError, option
from merging.maths.shapes import Shapes
from merging.sources import Adapter
from merging.sources.diffusion_names import Known, known_names, spellings
from merging.sources.fused_names import RowRange
from merging.sources.lora_names import normal_name
from merging.sources.model_families import family_by_names
from merging.sources.regions import TensorPart

__all__ = ["DiffusionMatch", "DiffusionNames", "name_families"]


@dataclass(frozen=True, slots=True)
class DiffusionMatch:
    """The parts that an adapter's targets are of the base's tensors, and the shapes of the targets."""

    pieces: dict[str, list[TensorPart]]
    shapes: dict[str, tuple[int, ...]]


class DiffusionNames:
    """All names that LoRA files have for a base's tensors, or for rows of several, in the normal form."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        known = known_names(shapes)
        t5 = any(each.component == "text_encoder_2" and each.name.startswith("encoder.block.") for each in known)
        alone = not {"transformer", "transformer_2"} <= {each.component for each in known}
        self._known: dict[tuple[str, str], Known] = {}
        for each in known:
            for name in spellings(each, t5, alone):
                self._known.setdefault(name, each)

    def find(self, adapter: Adapter) -> DiffusionMatch | None:
        """Return the match of an adapter's targets, None for an adapter none of whose names is known.

        Raises :class:`~merging.errors.InputError` where some names have no place, or two have one.
        """
        named = {target: self._known.get(normal_name(target)) for target in adapter.changes}
        found = {target: known for target, known in named.items() if known}
        if not found or (adapter.names_modules and len(found) < len(adapter.changes)):
            return None
        left = [target for target in adapter.changes if target not in found]
        if left:
            raise self._without_place(adapter, left)
        shapes = {target: self._shape(known) for target, known in found.items()}
        for target, shape in shapes.items():
            if not adapter.changes[target].fits(shape):
                raise InputError(
                    f"{adapter.path}: {target} has the shape {adapter.changes[target].shape}, and the base's tensor "
                    f"{shape}: is this the kind of model it was trained on?"
                )
        _refuse_overlaps(adapter, found)
        return DiffusionMatch({target: self._pieces(known) for target, known in found.items()}, shapes)

    def _without_place(self, adapter: Adapter, left: Sequence[str]) -> InputError:
        """Return the error for targets that the base does not have."""
        share = f"{len(left)} of {len(adapter.changes)} targets have no place"
        missing = f"{adapter.path}: {left[0]} is not a tensor of the base ({share})"
        families = name_families(adapter, self._shapes)
        texts = all(normal_name(target)[0].startswith("text_encoder") for target in left)
        if not texts or any(known.component.startswith("text_encoder") for known in self._known.values()):
            return InputError(
                f"{missing}: does the base hold every part of the model that this LoRA was trained on?{families}"
            )
        start = "lora_te" if left[0].startswith("lora_te") else "text_encoder"
        return InputError(
            f"{missing}: the base has no text encoder: give the whole pipeline with {option('base')}, or leave these "
            f"out with {option('exclude', start)}{families}"
        )

    def undecided(self, adapter: Adapter) -> bool:
        """Return whether the base has two denoisers, and the adapter's names do not say which one is meant."""
        both = {"transformer", "transformer_2"} <= {known.component for known in self._known.values()}
        return both and not any(target.startswith(("transformer.", "transformer_2.")) for target in adapter.changes)

    def _shape(self, known: Known) -> tuple[int, ...]:
        return sum(part.length for part in known.rows), *self._shapes[known.rows[0].name][1:]

    def _pieces(self, known: Known) -> list[TensorPart]:
        """Return the parts that a tensor is, one for each run of its rows."""
        pieces, start = [], 0
        for part in known.rows:
            rest = self._shapes[part.name][1:]
            box = (slice(part.start, part.start + part.length), *(slice(0, size) for size in rest))
            pieces.append(TensorPart(part.name, box, tuple(range(len(box))), (start, *(0 for _ in rest))))
            start += part.length
        return pieces


def name_families(adapter: Adapter, shapes: Shapes) -> str:
    """Return a sentence on the families of an adapter and of its base where they differ, empty if nothing shows it."""
    targets = {target: change.shape for target, change in adapter.changes.items()}
    of, base = family_by_names(targets, {}), family_by_names(shapes, {})
    if of is None or base is None or of.name == base.name:
        return ""
    return f" It looks like a LoRA of {of.name}, and the base like {base.name}"


def _refuse_overlaps(adapter: Adapter, found: Mapping[str, Known]) -> None:
    taken: dict[RowRange, str] = {}
    for target, known in found.items():
        for part in known.rows:
            other = taken.setdefault(part, target)
            if other != target:
                raise InputError(
                    f"{adapter.path}: {other} and {target} are one tensor of the base ({part.name}), under two names: "
                    f"give the base that has both, or remove one of them"
                )
