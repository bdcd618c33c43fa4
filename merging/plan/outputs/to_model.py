"""Planning a merged model: every tensor of the base, or else of the first full model, comes out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from merging.errors import InputError, nearest, option
from merging.maths.patterns import all_matching
from merging.maths.site import Site, inputs_by_outputs, site_of
from merging.methods.blocks import scales_at
from merging.plan.inputs.task_heads import NO_HEADS, TaskHeads
from merging.plan.inputs.tied_heads import add_tied_head, find_own_heads, is_untied
from merging.plan.items import Item
from merging.plan.names.resolve import Resolver
from merging.plan.outputs.planned import PlannedOutput
from merging.plan.outputs.rounded_base import round_base
from merging.plan.recipe import DTYPES, Recipe
from merging.plan.stacks import find_stacks, mark_experts
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.changes import Change
from merging.sources.renaming import find_renaming
from merging.sources.stored import Stored
from merging.storage.output_tensor import OutputTensor

__all__ = ["plan_model"]

Inputs = dict[str, Stored | Change]
"""The tensors or changes of one model, by the reference's names."""


@dataclass(slots=True)
class _Aligned:
    """One model's tensors under the reference's names, a ``line`` about the rule, and what does not fit.

    ``mismatches`` are sentences; ``surplus`` are the names that the reference lacks.
    """

    inputs: Inputs
    line: str
    mismatches: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)


def plan_model(
    recipe: Recipe,
    models: Sequence[Model],
    base: Checkpoint | None,
    *,
    weights: bool,
    heads: TaskHeads = NO_HEADS,
) -> PlannedOutput:
    """Plan a merged model: every tensor of the base, or else of the first full model, comes out.

    Args:
        recipe: the recipe.
        models: the models, with vocabularies of one size.
        base: the base, if there is one.
        weights: whether weights are merged, and not changes from the base.
        heads: stand for heads that no base has; ``exclude`` may also name those that are left out already.

    Raises:
        InputError: for tensors that do not fit, unless the recipe keeps the base's.
    """
    reference = base or next(model for model in models if isinstance(model, Checkpoint))
    stacks, guess = find_stacks(recipe, models, reference, ())
    known = dict(reference.tensors) | find_own_heads(models, reference)
    resolver = Resolver(known, reference.config, heads.tensors)
    aligned = [_align(model, known, resolver) for model in models]
    mismatches = [each for model in aligned for each in model.mismatches]
    if mismatches and recipe.on_mismatch == "error":
        raise InputError(
            f"the models do not hold the same tensors as {reference.path}: {_first_three(mismatches, '; ')}. Use "
            f"{option('on_mismatch', 'base')} to keep {reference.path.name}'s where they differ"
        )
    inputs = [each.inputs for each in aligned]
    matched = [each.line for each in aligned]
    differing = _incomplete(models, inputs, known) if mismatches else set()
    if differing:
        named = _first_three(sorted(differing))
        matched.append(
            f"{_count_tensors(differing)} that differ are {reference.path.name}'s ({option('on_mismatch', 'base')}): "
            f"{named}"
        )
    surplus = list(dict.fromkeys(name for each in aligned for name in each.surplus))
    notices = []
    if surplus:
        notices.append(
            f"{_count_tensors(surplus)} that {reference.path} lacks are left out ({option('on_mismatch', 'base')} "
            f"keeps its tensors alone): {_first_three(surplus)}"
        )
    tensors, inputs, kept = add_tied_head(known, inputs, reference)
    excluded = all_matching(recipe.exclude, [*tensors, *heads.excluded])
    turned = inputs_by_outputs({name: stored.shape for name, stored in tensors.items()})
    sites = {name: site_of(name, stored.shape, stacks, name in turned) for name, stored in tensors.items()}
    rounded = round_base(recipe.as_trained, reference, models, sites, inputs)
    items, untouched = [], []
    for name, stored in tensors.items():
        scales = scales_at(recipe.method, sites[name], len(inputs))
        given = tuple(each.get(name) for each in inputs)
        if scales:
            given = tuple(each if scale else None for each, scale in zip(given, scales, strict=True))
        copied = name in differing or name in kept or name in excluded
        if stored.floating and not copied and not any(given) and any(name in each for each in inputs):
            untouched.append(sites[name])
        dtype_name = DTYPES[recipe.dtype] if recipe.dtype and stored.floating else stored.dtype_name
        item = _item(
            sites[name],
            rounded.weights.get(name, stored),
            () if copied else given,
            recipe,
            outs=(OutputTensor(name, dtype_name, stored.shape),),
            scales=scales,
            based=base is not None,
            weights=weights,
        )
        items.append(item)
    notices += rounded.notices
    untied = is_untied(tensors, reference)
    return PlannedOutput(items=items, untouched=untouched, matched=matched, notices=notices, guess=guess, untied=untied)


def _count_tensors(names: Collection[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _first_three(names: Sequence[str], between: str = ", ") -> str:
    return between.join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def _align(model: Model, known: Mapping[str, Stored], resolver: Resolver) -> _Aligned:
    """Put a model's tensors or changes under the reference's names."""
    if isinstance(model, Adapter):
        resolved = resolver.resolve(model)
        return _Aligned(dict(resolved.changes), resolved.line)

    def fits(name: str, match: str) -> bool:
        ours, theirs = model.tensors[name], known[match]
        return ours.shape == theirs.shape and ours.floating == theirs.floating

    renaming, left = find_renaming(model.tensors, known, fits)
    gone = set(left)
    inputs: Inputs
    if renaming.is_identity:
        inputs = {name: stored for name, stored in model.tensors.items() if name not in gone}
    else:
        inputs = {str(renaming(name)): stored for name, stored in model.tensors.items() if name not in gone}
    aligned = _Aligned(inputs, "")
    for name in left:
        match = renaming(name)
        if match is None or match not in known:
            aligned.surplus.append(match or name)
            aligned.mismatches.append(
                f"{model.path} has {name}, which the other lacks{nearest(name, known) if len(known) < 500 else ''}"
            )
        else:
            aligned.mismatches.append(f"{name} of {model.path} has {_difference(model.tensors[name], known[match])}")
    for name in known.keys() - inputs.keys():
        stored = model.lookup(name)
        if stored is not None and stored.shape == known[name].shape and stored.floating == known[name].floating:
            inputs[name] = stored
        elif not any(renaming(other) == name for other in left):
            aligned.mismatches.append(f"{model.path} lacks {name}")
    total = len(known) + len(aligned.surplus)
    aligned.line = f"{model.path}: {len(inputs)} of {total} tensors matched by {renaming}"
    return aligned


def _difference(own: Stored, other: Stored) -> str:
    if own.shape != other.shape:
        return f"the shape {tuple(own.shape)} instead of {tuple(other.shape)}"
    return f"the type {own.dtype_name}"


def _incomplete(models: Sequence[Model], inputs: Sequence[Inputs], known: Mapping[str, Stored]) -> set[str]:
    """Return the names that some checkpoint has no tensor for."""
    full = [each for model, each in zip(models, inputs, strict=True) if isinstance(model, Checkpoint)]
    return {name for name in known if any(name not in each for each in full)}


def _item(
    site: Site,
    stored: Stored,
    inputs: tuple[Stored | Change | None, ...],
    recipe: Recipe,
    *,
    outs: tuple[OutputTensor, ...],
    scales: tuple[float, ...],
    based: bool,
    weights: bool,
) -> Item:
    """Return the item of a tensor; it is copied where no model has an input for it."""
    site = mark_experts(site, inputs)
    if not stored.floating or not any(inputs):
        return Item(site, inputs, stored, outs, "copy")
    # A base that only lends its names is not read.
    reads_base = not weights or bool(scales) or None in inputs or any(isinstance(each, Change) for each in inputs)
    needed = based and (reads_base or recipe.method.rescales)
    return Item(site, inputs, stored if needed else None, outs, "dense", scales=scales)
