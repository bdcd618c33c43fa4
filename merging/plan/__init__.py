"""From a recipe to a plan: headers are read, names matched, shapes compared, and every refusal is made here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from merging.errors import InputError, MergingError, OptionError, option
from merging.hub.open_model import require_full
from merging.methods.blocks import interpolate
from merging.methods.contract.places import check_places, idle_parameters
from merging.plan.checks import (
    apply_out_proj_once,
    check_bases,
    check_options,
    check_packed,
    choose_output,
    idle_options,
    make_content_keys,
)
from merging.plan.entries import MakeStage, open_entries
from merging.plan.inputs.components import select_components
from merging.plan.inputs.extracted_changes import extract_changes
from merging.plan.inputs.head_order import order_by_heads
from merging.plan.inputs.intruders import reduce_intruders
from merging.plan.inputs.layouts import match_layouts
from merging.plan.inputs.sentence_folders import describe_differences
from merging.plan.inputs.stated_bases import describe_other_bases
from merging.plan.inputs.statistics_files import attach_statistics, match_statistics
from merging.plan.inputs.task_heads import NO_HEADS, TaskHeads, find_task_heads
from merging.plan.inputs.tied_heads import resolve_tied_heads
from merging.plan.inputs.vocabulary import Vocabulary, match_vocabularies
from merging.plan.items import Item, cut_items
from merging.plan.merge_plan import Plan
from merging.plan.outputs.planned import PlannedOutput
from merging.plan.outputs.quantized import quantize_output
from merging.plan.outputs.to_adapter import plan_adapter
from merging.plan.outputs.to_model import plan_model
from merging.plan.provenance import record_sources
from merging.plan.rank_settings import RankSettings
from merging.plan.recipe import Entry, Recipe
from merging.plan.stages import Companions, Stage, make_stage
from merging.plan.tokens.chat_templates import pin_chat_template, resolve_chat_template
from merging.plan.tokens.matching import MatchedTokens, download_tokenizer
from merging.plan.tokens.settings import PRESETS
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.garbage import pause_collection
from merging.sources.statistics_file import StatisticsFile

__all__ = ["PORTABLE_RANKS", "Item", "Plan", "make_plan", "plan_of"]

PORTABLE_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks that every program serves; a merged adapter's folder is padded with zeros up to the next of them."""


_PLACED = re.compile(r"(?:models|base|stack)[.\w]*: ")
"""The beginning of an error about a recipe among the models of another one."""


def make_plan(
    recipe: Recipe, rank_steps: Sequence[int] = (), write_companions: Companions = lambda plan, folder: {}
) -> Plan:
    """Open the models of a recipe and plan their merge.

    Headers and configs are read, and few values: samples of each tensor, from which the models' content keys are made,
    and a whole head where a file holds one that may be a copy of the embedding.

    Args:
        recipe: the recipe.
        rank_steps: the ranks that a merged adapter may have (:data:`PORTABLE_RANKS`); any if there are none.
        write_companions: writes config and tokenizer of the output of a recipe among the models into a folder.

    Returns:
        The plan, which nothing but values that cannot be merged can stop.

    Raises:
        MergingError: for models that cannot be opened, or cannot be merged as the recipe says.
    """
    stages: dict[tuple[str, int], Stage] = {}

    def plan_stage(inner: Recipe, place: str, matched: Mapping[str, Model]) -> Stage:
        if isinstance(inner.rank, RankSettings):
            raise OptionError(f"{place}: conditions on ranks are for the output of the whole recipe: give a number")
        if inner.quantize is not None:
            raise OptionError(
                f"{place}: {option('quantize')} is for the output of the whole recipe: give it there, and leave it out "
                f"here"
            )
        key = inner.to_yaml(), id(matched) if matched else 0
        if key not in stages:
            try:
                planned = _open_and_plan(inner, (), plan_stage, place, matched)
                stages[key] = make_stage(planned, place, write_companions)
            except MergingError as error:
                raise error if _PLACED.match(str(error)) else type(error)(f"{place}: {error}") from None
        return stages[key]

    with pause_collection():
        return _open_and_plan(recipe, rank_steps, plan_stage)


def _open_and_plan(
    recipe: Recipe,
    rank_steps: Sequence[int],
    plan_stage: MakeStage,
    place: str = "",
    matched: Mapping[str, Model] = MappingProxyType({}),
) -> Plan:
    opened = open_entries(recipe, plan_stage, place, matched)
    recipe.method.check(len(opened.models))
    base = None if opened.base is None else require_full(opened.base, opened.base.path, option("base"))
    if base is None and all(isinstance(model, Checkpoint) for model in opened.models):
        method = interpolate(opened.recipe.method, len(opened.models))
        opened = replace(opened, recipe=opened.recipe.model_copy(update={"method": method}))
    heads = find_task_heads(opened.models, base, recipe.exclude)
    statistics = match_statistics(opened.recipe, opened.models)
    plan = plan_of(opened.recipe, opened.models, base, rank_steps, heads, matched=opened.matched, statistics=statistics)
    keys = {id(model): key.partition("#")[0] for model, key in zip(plan.models, plan.keys, strict=True)}
    return replace(plan, sources=record_sources(recipe, opened.files, keys), files=opened.files, stages=opened.stages)


def plan_of(
    recipe: Recipe,
    models: Sequence[Model],
    base: Checkpoint | None,
    rank_steps: Sequence[int] = (),
    heads: TaskHeads = NO_HEADS,
    *,
    matched: MatchedTokens | None = None,
    statistics: Sequence[StatisticsFile] = (),
) -> Plan:
    """Plan the merge of models and a base that are open already.

    Args:
        recipe: the recipe.
        models: the models, in the order of the recipe.
        base: the base, if there is one.
        rank_steps: the ranks that a merged adapter may have; any if there are none.
        heads: stand for heads that the base does not have.
        matched: the tokens of the models, where their rows are matched by token already.
        statistics: the statistics of examples of each model, where the method needs them.

    Raises:
        MergingError: for models that cannot be merged as the recipe says.
    """
    with pause_collection():
        inputs = recipe, heads.without_excluded(models), heads.on_base(base), rank_steps, heads
        make = partial(_plan, *inputs, matched=matched, statistics=statistics)
        plan = make()
        if not isinstance(recipe.rank, RankSettings):
            return plan
        return replace(plan, sized=lambda ranks: replace(make(chosen=ranks), keys=plan.keys))


def _plan(
    recipe: Recipe,
    models: Sequence[Model],
    base: Checkpoint | None,
    rank_steps: Sequence[int],
    heads: TaskHeads,
    *,
    matched: MatchedTokens | None = None,
    statistics: Sequence[StatisticsFile] = (),
    chosen: Mapping[str, int] | None = None,
) -> Plan:
    output, weights = choose_output(recipe, models, base, heads.tensors)
    check_packed(models, base, recipe.allow_different_bases)
    models, base = resolve_tied_heads(*select_components(recipe, models, base))
    recipe = _pin_revisions(recipe, models, base)
    check_options(recipe, models, output)
    models = order_by_heads(models, base)
    models, remarks = apply_out_proj_once(recipe, models)
    check_bases(models, recipe.allow_different_bases)
    keys, notices = make_content_keys(models)
    notices += [notice for model in models if isinstance(model, Adapter) for notice in model.notices]
    notices += describe_other_bases(models, base)
    notices += describe_differences(models, base) if output == "model" else []
    models, layouts = match_layouts(models, base)
    alike, based, vocabulary, resized = match_vocabularies(recipe, models, base, matched)
    recipe = _pin_donor(recipe, vocabulary)
    notices += remarks + layouts + heads.notices + resized
    if output == "adapter":
        adapters, lost = _as_adapters(recipe, alike, based)
        notices += lost
        planned = plan_adapter(
            recipe, adapters, based, weights=weights, heads=heads, rank_steps=rank_steps, chosen=chosen
        )
    else:
        planned = plan_model(recipe, alike, based, weights=weights, heads=heads)
    reduced, untouched = reduce_intruders(planned.items, recipe.reduce_intruders)
    notices += untouched
    notices += planned.notices + _check_sites(recipe, planned, output, len(models), base is not None)
    reduced, unweighted = attach_statistics(reduced, statistics, recipe.method)
    notices += unweighted
    items = cut_items(sorted(reduced, key=Item.order), recipe.method, weights)
    quantized = None
    if recipe.quantize is not None:
        reference = based or next(model for model in alike if isinstance(model, Checkpoint))
        items, quantized = quantize_output(recipe.quantize, items, reference)
        notices += quantized.notices
    return Plan(
        recipe=recipe,
        models=tuple(models),
        base=base,
        keys=keys,
        output=output,
        weights=weights,
        items=items,
        rank=planned.rank,
        ranks=planned.ranks,
        untied=planned.untied,
        notices=tuple(notices),
        matched=tuple(planned.matched),
        vocabulary=vocabulary,
        chat_template=_find_template(recipe, models, base),
        format=planned.format,
        header=planned.header,
        constants=planned.constants,
        quantized=quantized,
    )


def _pin_donor(recipe: Recipe, vocabulary: Vocabulary | None) -> Recipe:
    """Return the recipe with the commit of a model that lends its tokenizer alone."""
    of = vocabulary.of if vocabulary and vocabulary.matched else None
    if of is None or of.origin is None or recipe.tokenizer is None or recipe.tokenizer.source in PRESETS:
        return recipe
    commit = str(of.origin)
    source = recipe.tokenizer.source
    pinned = recipe.tokenizer.rename(lambda name: commit if name == source else name)
    return recipe.model_copy(update={"tokenizer": pinned})


def _as_adapters(recipe: Recipe, models: Sequence[Model], base: Checkpoint | None) -> tuple[list[Adapter], list[str]]:
    """Return the models as adapters, full ones as their changes from the base, and remarks on these."""
    adapters, remarks = [], []
    for model in models:
        if isinstance(model, Checkpoint):
            assert base is not None
            model, lost = extract_changes(recipe, model, base)
            remarks += lost
        adapters.append(model)
    return adapters, remarks


def _find_template(recipe: Recipe, models: Sequence[Model], base: Checkpoint | None) -> str | None:
    """Return the text of the chat template that the recipe asks for, if any."""
    if recipe.chat_template is None:
        return None
    given = [base, *models] if base else models
    checkpoints = {model.path: model for model in given if isinstance(model, Checkpoint)}  # a base may be a model too
    if recipe.chat_template == "auto":
        for model in checkpoints.values():
            download_tokenizer(model)
    return resolve_chat_template(recipe.chat_template, list(checkpoints.values()))


def _check_sites(recipe: Recipe, planned: PlannedOutput, output: str, models: int, based: bool) -> list[str]:
    """Check the parameters at every site that is merged, and return remarks on options without effect.

    Raises :class:`~merging.errors.MergingError` where a parameter has no value, or nothing is left to merge.
    """
    sites = [item.site for item in planned.items if item.form != "copy"]
    remedy = "" if based else f"give the model with {option('base')}, whose names may show it, or "
    every = [*sites, *planned.untouched]
    idle = check_places(recipe.method, every, models, remedy, allow_unmatched=recipe.allow_unmatched)
    notices = [*idle, *idle_options(recipe, output), *idle_parameters(recipe.method, sites)]
    if recipe.exclude and not every:
        raise OptionError("exclude leaves nothing to merge: name fewer tensors")
    if not every:
        raise InputError("there is nothing to merge: the models share no tensor of floating-point numbers")
    if planned.guess and recipe.method.by_depth:
        notices.append(planned.guess)
    return notices


def _pin_revisions(recipe: Recipe, models: Sequence[Model], base: Checkpoint | None) -> Recipe:
    """Return the recipe with models of the Hub named by their commits, and a chat template's file by its text.

    So it always means the same bytes.

    The last models may have no name in the recipe: the models that a store holds.
    """
    named = [*zip(recipe.models, models, strict=False), *([(recipe.base, base)] if recipe.base and base else [])]
    pins = {name: str(model.origin) for name, model in named if isinstance(name, str) and model.origin}

    def pin(entry: Entry) -> Entry:
        return pins.get(entry, entry) if isinstance(entry, str) else entry

    update: dict[str, object] = {"models": tuple(map(pin, recipe.models)), "base": recipe.base and pin(recipe.base)}
    if recipe.tokenizer is not None:
        update["tokenizer"] = recipe.tokenizer.rename(lambda name: pins.get(name, name))
    if recipe.chat_template is not None:
        update["chat_template"] = pin_chat_template(recipe.chat_template)
    return recipe.model_copy(update=update)
