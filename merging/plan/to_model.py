"""Planning a merge whose result is a full model: every tensor of the base (or of the first model) comes out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from merging.errors import InputError, nearest
from merging.maths.layers import Stacks
from merging.maths.parameters import all_matching
from merging.maths.site import Site, inputs_by_outputs, site_of
from merging.plan.heads import is_untied, own_heads, with_tied_copy
from merging.plan.items import Item
from merging.plan.recipe import DTYPES, Recipe
from merging.plan.resolve import Resolver
from merging.plan.sites import mark_experts
from merging.plan.task_heads import NO_HEADS, TaskHeads
from merging.sources import Adapter, Checkpoint
from merging.sources.adapter import Change
from merging.sources.renaming import find_renaming
from merging.sources.stored import Stored
from merging.storage.output_tensor import OutputTensor

__all__ = ["model_items"]

Inputs = dict[str, Stored | Change]
"""What one model brings, by the reference's names."""


def model_items(
    recipe: Recipe,
    models: Sequence[Checkpoint | Adapter],
    reference: Checkpoint,
    base: Checkpoint | None,
    stacks: Stacks,
    weights: bool,
    heads: TaskHeads = NO_HEADS,
) -> tuple[list[Item], list[str], list[str], bool]:
    """The items of the merge, lines about how names were matched, notices, and whether the output head is untied.

    ``reference`` gives names, shapes and dtypes: the base, or else the first model. ``heads`` stand for heads that no
    base has; patterns may also mean those among them that are left out already. Raises
    :class:`~merging.errors.InputError` for tensors that do not fit, unless the recipe keeps the base's.
    """
    known = dict(reference.tensors)
    known |= own_heads(models, reference)
    resolver = Resolver(known, reference.config, heads.tensors)
    matched: list[str] = []
    inputs: list[Inputs] = []
    mismatches: list[str] = []
    surplus: dict[str, None] = {}
    for model in models:
        brought: Inputs
        if isinstance(model, Adapter):
            resolved = resolver.resolve(model)
            brought, line = dict(resolved.changes), resolved.line
        else:
            brought, line = _align(model, known, mismatches, surplus)
        inputs.append(brought)
        matched.append(line)
    if mismatches and recipe.on_mismatch == "error":
        raise InputError(
            f"the models do not hold the same tensors as {reference.path}: {_first_three(mismatches, '; ')}. "
            f"Use --on-mismatch base to keep {reference.path.name}'s where they differ"
        )
    skip = _incomplete(models, inputs, known) if mismatches else set()
    notices = []
    if skip:
        named = _first_three(sorted(skip))
        matched.append(f"{_counted(skip)} that differ are {reference.path.name}'s (--on-mismatch base): {named}")
    if surplus:
        notices.append(
            f"{_counted(surplus)} that {reference.path} lacks are left out (--on-mismatch base keeps its tensors "
            f"alone): {_first_three(list(surplus))}"
        )
    names = with_tied_copy(known, inputs, reference, skip)
    untied = is_untied(names, reference)
    left = all_matching(recipe.exclude, [*names, *heads.excluded])
    turned = inputs_by_outputs({name: stored.shape for name, stored in names.items()})
    items = [
        _item(
            site_of(name, stored.shape, stacks, name in turned),
            stored,
            base,
            inputs,
            recipe,
            weights,
            plain=name in skip or name in left,
        )
        for name, stored in names.items()
    ]
    return items, matched, notices, untied


def _counted(names: Collection[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _first_three(names: Sequence[str], between: str = ", ") -> str:
    return between.join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def _align(
    model: Checkpoint, known: Mapping[str, Stored], mismatches: list[str], surplus: dict[str, None]
) -> tuple[Inputs, str]:
    """A checkpoint's tensors under the reference's names.

    What does not fit goes to ``mismatches``, and the names that the reference lacks also to ``surplus``.
    """

    def fits(name: str, match: str) -> bool:
        ours, theirs = model.tensors[name], known[match]
        return ours.shape == theirs.shape and ours.floating == theirs.floating

    renaming, left = find_renaming(model.tensors, known, fits)
    gone = set(left)
    brought: dict[str, Stored | Change] = {
        str(renaming(name)): stored for name, stored in model.tensors.items() if name not in gone
    }
    more = 0
    for name in left:
        match = renaming(name)
        if match is None or match not in known:
            more += 1
            surplus[match or name] = None
            mismatches.append(
                f"{model.path} has {name}, which the other lacks{nearest(name, known) if len(known) < 500 else ''}"
            )
        else:
            shape, other = tuple(model.tensors[name].shape), tuple(known[match].shape)
            what = (
                f"the shape {shape} instead of {other}"
                if shape != other
                else f"the type {model.tensors[name].dtype_name}"
            )
            mismatches.append(f"{name} of {model.path} has {what}")
    for name in known.keys() - brought.keys():
        stored = model.lookup(name)
        if stored is not None and stored.shape == known[name].shape and stored.floating == known[name].floating:
            brought[name] = stored
        elif not any(renaming(other) == name for other in left):
            mismatches.append(f"{model.path} lacks {name}")
    return brought, f"{model.path}: {len(brought)} of {len(known) + more} tensors matched by {renaming}"


def _incomplete(models: Sequence[Checkpoint | Adapter], inputs: list[Inputs], known: Mapping[str, Stored]) -> set[str]:
    full = [brought for model, brought in zip(models, inputs, strict=True) if isinstance(model, Checkpoint)]
    return {name for name in known if any(name not in brought for brought in full)}


def _item(
    site: Site,
    stored: Stored,
    base: Checkpoint | None,
    inputs: list[Inputs],
    recipe: Recipe,
    weights: bool,
    plain: bool,
) -> Item:
    kind = DTYPES[recipe.dtype] if recipe.dtype and stored.floating else stored.dtype_name
    outs = (OutputTensor(site.name, kind, stored.shape),)
    brought = tuple(each.get(site.name) for each in inputs)
    site = mark_experts(site, brought)
    if plain or not stored.floating or not any(brought):
        return Item(site, () if plain else brought, stored, outs, "copy")
    # A base that only lends its names is not read.
    reads_base = not weights or None in brought or any(isinstance(each, Change) for each in brought)
    needed = base is not None and (reads_base or recipe.method.rescales)
    return Item(site, brought, stored if needed else None, outs, "dense")
