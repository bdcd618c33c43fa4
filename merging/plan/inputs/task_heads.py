"""Heads for a task, as of classifiers, that PEFT saves in full with an adapter and that no base has."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from merging.errors import InputError, option
from merging.maths.patterns import matches
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.changes import Replacement
from merging.sources.extended_tables import MeanTable
from merging.sources.lora_names import normal_name
from merging.sources.stored import Stored

__all__ = ["NO_HEADS", "TaskHeads", "find_task_heads"]

_HEAD = re.compile(r"(?:^|\.)(?:score|classifier|qa_outputs|pre_classifier|classification_head)\.")
"""Modules that transformers puts on top of a model for a task, with values that each training draws."""
_BLOCK = re.compile(r"(?:^|\.)[0-9]+\.")


@dataclass(frozen=True, slots=True)
class TaskHeads:
    """Tensors that stand for the base where it has no such head.

    A merge of changes from the mean is the mean for every sum whose weights add up to 1.

    Attributes:
        tensors: by target, the mean of the heads that adapters hold.
        excluded: targets that the recipe leaves out, and that no base need have.
    """

    tensors: Mapping[str, Stored] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()

    def on_base(self, base: Checkpoint | None) -> Checkpoint | None:
        """Return a base with these heads among its tensors."""
        return replace(base, tensors={**base.tensors, **self.tensors}) if base and self.tensors else base

    def without_excluded(self, models: Sequence[Model]) -> tuple[Model, ...]:
        """Return the models without the heads that are left out."""
        return tuple(self._without(model) if isinstance(model, Adapter) else model for model in models)

    def _without(self, adapter: Adapter) -> Adapter:
        kept = {target: change for target, change in adapter.changes.items() if target not in self.excluded}
        return adapter if len(kept) == len(adapter.changes) else replace(adapter, changes=kept)

    @property
    def notices(self) -> list[str]:
        """Remarks on the heads."""
        if not self.tensors:
            return []
        return [
            f"{', '.join(sorted(self.tensors))}: saved in full and in no base here, so that the mean stands for the "
            f"base's: give {option('base')} if that has it, or leave it out with {option('exclude')}"
        ]


NO_HEADS = TaskHeads()
"""No heads, or heads that the base has."""


def find_task_heads(models: Sequence[Model], base: Checkpoint | None, exclude: Sequence[str]) -> TaskHeads:
    """Return the heads that adapters hold in full and that ``base``, which may be None, lacks.

    Raises :class:`~merging.errors.InputError` for heads of different sizes.
    """
    found: defaultdict[str, list[tuple[Adapter, Replacement]]] = defaultdict(list)
    for model in (each for each in models if isinstance(each, Adapter)):
        for target, change in model.changes.items():
            named = _HEAD.search(target) and not _BLOCK.search(target)
            if named and isinstance(change, Replacement) and (base is None or base.lookup(target) is None):
                found[target].append((model, change))
    texts = [target for model in models if isinstance(model, Adapter) for target in _text_targets(model)]
    excluded = {target for target in (*found, *texts) if any(matches(pattern, target) for pattern in exclude)}
    tensors = {}
    for target, held in found.items():
        if target in excluded:
            continue
        (first, change), *others = held
        for other, its in others:
            if its.shape != change.shape:
                raise InputError(
                    f"{target} is {change.shape} in {first.path} and {its.shape} in {other.path}: these heads are for "
                    f"different labels: leave them out with {option('exclude', target.partition('.')[0])}"
                )
        tensors[target] = MeanTable(tuple(its.value for _, its in held))
    return TaskHeads(tensors, frozenset(excluded))


def _text_targets(adapter: Adapter) -> list[str]:
    """Return the targets in text encoders of a diffusion model, which a base of the denoiser alone does not have."""
    if adapter.names_modules:
        return []
    return [target for target in adapter.changes if normal_name(target)[0].startswith("text_encoder")]
