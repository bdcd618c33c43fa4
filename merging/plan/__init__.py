"""From a recipe to a plan: headers are read, names matched, shapes compared, and all that can be refused is refused."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from merging.errors import InputError, OptionError
from merging.hub.open_model import open_base, open_model
from merging.methods.contract.places import check_places, idle_parameters
from merging.plan.checks import (
    attention_counted,
    check_bases,
    check_options,
    check_origin,
    check_packed,
    check_related,
    content_keys,
    idle_options,
    taken_as_linear,
)
from merging.plan.chosen import chosen
from merging.plan.heads import settled
from merging.plan.items import Item, Plan, cut_items
from merging.plan.recipe import Recipe
from merging.plan.sites import find_stacks
from merging.plan.targets import adapter_targets
from merging.plan.task_heads import NO_HEADS, TaskHeads, find_task_heads
from merging.plan.to_adapter import AdapterItems, adapter_items
from merging.plan.to_model import model_items
from merging.plan.vocabulary import fitted
from merging.sources import Adapter, Checkpoint

__all__ = ["PORTABLE_RANKS", "Item", "Plan", "make_plan", "plan_of"]

PORTABLE_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks that every program serves; a merged adapter's folder is padded with zeros up to the next of them."""


def make_plan(recipe: Recipe, rank_steps: Sequence[int] = ()) -> Plan:
    """Everything about the merge that headers and configs can tell.

    Few values are read: samples of each tensor, from which the models' content keys are made, and a head whole where a
    file holds one that may be a copy of the embedding.

    ``rank_steps`` are the ranks that a merged adapter may have (:data:`PORTABLE_RANKS`), any if there are none. Raises
    :class:`~merging.errors.MergingError` for all that cannot be merged as the recipe says.
    """
    models = tuple(open_model(path, recipe.lora_alpha, recipe.dequantise) for path in recipe.models)
    recipe.method.check(len(models))
    base = None if recipe.base is None else open_base(recipe.base, "--base", recipe.dequantise)
    return plan_of(recipe, models, base, rank_steps, find_task_heads(models, base, recipe.exclude))


def plan_of(
    recipe: Recipe,
    models: Sequence[Checkpoint | Adapter],
    base: Checkpoint | None,
    rank_steps: Sequence[int] = (),
    heads: TaskHeads = NO_HEADS,
) -> Plan:
    """The plan of a recipe whose models and base are open already; ``heads`` stand for what the base has none of."""
    # A plan of 50,000 tensors is a million objects that all live on: collecting garbage among them doubles the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _plan_of(recipe, heads.without_excluded(models), heads.on_base(base), rank_steps, heads)
    finally:
        if collecting:
            gc.enable()


def _plan_of(
    recipe: Recipe,
    models: tuple[Checkpoint | Adapter, ...],
    base: Checkpoint | None,
    rank_steps: Sequence[int],
    heads: TaskHeads,
) -> Plan:
    output, weights = check_origin(recipe, models, base, heads.tensors)
    check_packed(models, base, recipe.allow_different_bases)
    models, base = settled(*chosen(recipe, models, base))
    recipe = _pinned(recipe, models, base)
    check_options(recipe, models, output)
    models, remarks = attention_counted(recipe, models)
    check_bases(models, recipe.allow_different_bases)
    keys, notices = content_keys(models)
    notices += [notice for model in models if isinstance(model, Adapter) for notice in model.notices]
    notices += remarks + heads.notices
    untied = False
    alike, based, vocabulary, remarks = fitted(recipe, models, base)
    notices += remarks
    if output == "adapter":
        adapters = [model for model in alike if isinstance(model, Adapter)]
        targets = adapter_targets(adapters, based, heads)
        alone = based is None
        notices += check_related(adapters, targets.changes.values(), recipe.allow_different_bases) if alone else []
        matched = targets.matched
        notices += taken_as_linear(adapters, based)
        stacks, guess = find_stacks(recipe, models, based, targets)
        made = adapter_items(recipe, adapters, based, targets, stacks, weights, rank_steps)
        notices += made.notices
    else:
        reference = based or next(model for model in alike if isinstance(model, Checkpoint))
        stacks, guess = find_stacks(recipe, models, reference, ())
        items, matched, remarks, untied = model_items(recipe, alike, reference, based, stacks, weights, heads)
        notices += remarks
        made = AdapterItems(items, 0)
    items = made.items
    check_places(recipe.method, [item.site for item in items if item.form != "copy"], len(models), _depth_remedy(base))
    notices += idle_options(recipe, output)
    notices += idle_parameters(recipe.method, [item.site for item in items if item.form != "copy"])
    if recipe.exclude and all(item.form == "copy" for item in items):
        raise OptionError("exclude leaves nothing to merge: name fewer tensors")
    if all(item.form == "copy" for item in items):
        raise InputError("there is nothing to merge: the models share no tensor of floating-point numbers")
    if guess and recipe.method.by_depth:
        notices.append(guess)
    return Plan(
        recipe=recipe,
        models=models,
        base=base,
        keys=keys,
        output=output,
        weights=weights,
        items=cut_items(sorted(items, key=Item.order), recipe.method, weights),
        rank=made.rank,
        untied=untied,
        notices=tuple(notices),
        matched=tuple(matched),
        vocabulary=vocabulary,
        format=made.format,
        header=made.header,
        constants=made.constants,
    )


def _depth_remedy(base: Checkpoint | None) -> str:
    """What can be done where the names of what is merged tell no depth."""
    return "" if base else "give the model with --base, whose names may tell it, or "


def _pinned(recipe: Recipe, models: Sequence[Checkpoint | Adapter], base: Checkpoint | None) -> Recipe:
    """The recipe with models of the Hub named by their commits, so that it means the same bytes for ever.

    There may be models that no name stands for (what a store holds): they come last.
    """
    named = zip(recipe.models, models, strict=False)
    pinned = {"models": tuple(str(model.origin or name) for name, model in named)}
    return recipe.model_copy(update=pinned | ({"base": str(base.origin)} if base and base.origin else {}))
