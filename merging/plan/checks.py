"""Checks before anything is planned: bases that differ, methods that need one, repeated models, idle options."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from merging.errors import InputError, OptionError, either, option
from merging.plan.find_base import unquantized_name
from merging.plan.rank_settings import RankSettings
from merging.plan.recipe import Recipe
from merging.plan.tokens.matching import check_tokenizer
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change
from merging.sources.checkpoint import content_key, files_key
from merging.sources.computed import ComputedChange
from merging.sources.peft.wrapped import added_twice, out_proj_once

__all__ = [
    "apply_out_proj_once",
    "check_bases",
    "check_options",
    "check_packed",
    "check_related",
    "choose_output",
    "idle_options",
    "key_of",
    "make_content_keys",
    "note_assumed_linear",
    "same_base",
]


def make_content_keys(models: Sequence[Checkpoint | Adapter]) -> tuple[tuple[str, ...], list[str]]:
    """Return a key of each model's content, repeats numbered, and a notice for each content that repeats.

    While a model's values are not on this machine, its key is made of the hashes of its files.
    """
    keys: list[str] = []
    paths: dict[str, list[str]] = {}
    for model in models:
        key = key_of(model)
        same = paths.setdefault(key, [])
        keys.append(f"{key}#{len(same)}" if same else key)
        same.append(str(model.path))
    return tuple(keys), [_describe_repeats(same) for same in paths.values() if len(same) > 1]


def key_of(model: Checkpoint | Adapter) -> str:
    """Return a key of a model's content, from samples of its values, or from the hashes of files on the Hub."""
    changes = model.changes if isinstance(model, Adapter) else {}
    parts = {f"{name} {i}": part for name, change in changes.items() for i, part in enumerate(change.tensors)}
    tensors = model.tensors if isinstance(model, Checkpoint) else parts
    return content_key(tensors) if all(each.at_hand for each in tensors.values()) else files_key(tensors)


def _describe_repeats(paths: Sequence[str]) -> str:
    """Return the notice for models of one content."""
    first, *others = dict.fromkeys(paths)
    times = "twice" if len(paths) == 2 else f"{len(paths)} times"
    if not others:
        return f"{first} is given {times}: it counts {times} in the merge"
    verb = "has" if len(others) == 1 else "have"
    return f"{' and '.join(others)} {verb} the same content as {first}: it counts {times} in the merge"


def check_bases(models: Sequence[Checkpoint | Adapter], allow_different: bool) -> None:
    """Refuse adapters that state different bases. Raises :class:`~merging.errors.InputError`."""
    stated = [(model, model.base) for model in models if isinstance(model, Adapter) and model.base]
    for model, base in stated[1:]:
        first, other = stated[0]
        if not same_base(other or "", base or "") and not allow_different:
            raise InputError(
                f"{model.path} was trained on {base}, and {first.path} on {other}: adapters of different bases do not "
                f"add up. If they are the same model under two names, use {option('allow_different_bases', True)}"
            )


def check_related(
    adapters: Sequence[Adapter], changes: Iterable[tuple[Change | None, ...]], allow_different: bool
) -> list[str]:
    """Refuse adapters that share no target and state no common base: nothing says that they belong to one model.

    ``changes`` are the changes of each target, one entry an adapter. Returns a notice instead where different bases are
    allowed.
    """
    sharing = {frozenset(place for place, change in enumerate(each) if change) for each in changes}
    related, rest = {0}, set(range(1, len(adapters)))
    while near := {each for each in rest if any(_related(adapters, each, other, sharing) for other in related)}:
        related |= near
        rest -= near
    if not rest:
        return []
    found = f"{adapters[min(rest)].path} and {adapters[0].path} adapt no tensor in common"
    if allow_different:
        return [f"{found}: their changes are put side by side, not added up"]
    raise InputError(
        f"{found}, and do not state one base: are they adapters of the same model? If so, give it with "
        f"{option('base')}, or use {option('allow_different_bases', True)} to put them side by side"
    )


def _related(adapters: Sequence[Adapter], one: int, other: int, sharing: set[frozenset[int]]) -> bool:
    if any({one, other} <= each for each in sharing):
        return True
    base, their_base = adapters[one].base, adapters[other].base
    return bool(base and their_base and same_base(base, their_base))


def check_packed(models: Sequence[Checkpoint | Adapter], base: Checkpoint | None, allow_different: bool) -> None:
    """Refuse packs that note the content of their base, where the base here or of another pack has another one."""
    noted = [(model, model.base_key) for model in models if isinstance(model, Adapter) and model.base_key]
    if allow_different or not noted:
        return
    at_hand = base is not None and all(stored.at_hand for stored in base.tensors.values())
    here = content_key(base.tensors) if base is not None and at_hand else None
    for model, key in noted:
        if here is not None and key != here and base is not None:
            raise InputError(
                f"{model.path} was packed with another base than {base.path}: give its own "
                f"base{f' ({model.base})' if model.base else ''}. If it is the same model in another type, use "
                f"{option('allow_different_bases', True)}"
            )
        first, other = noted[0]
        if key != other:
            raise InputError(
                f"{model.path} and {first.path} were packed with different bases, and what they hold does not add up. "
                f"If these are the same model in different types, use {option('allow_different_bases', True)}"
            )


def check_options(recipe: Recipe, models: Sequence[Checkpoint | Adapter], output: str) -> None:
    """Refuse options that would do nothing here. Raises :class:`~merging.errors.OptionError`."""
    if recipe.rank is not None and output == "model":
        base = "" if recipe.base else f" and {option('base', 'BASE')}"
        raise OptionError(
            f"{_name_rank(recipe.rank)}: only a merged adapter has ranks, and this merge makes a full model: leave "
            f"this out, or make an adapter with {option('kind', 'adapter')}{base}"
        )
    if recipe.format is not None and output == "model":
        raise OptionError(
            f"{option('format')} is the format of a merged adapter, and this merge makes a full model: leave it out"
        )
    if recipe.experts == "apart" and output == "model":
        raise OptionError(
            f"{option('experts')} is of a merged adapter, and this merge makes a full model: leave it out"
        )
    if recipe.experts == "apart" and recipe.format == "gguf":
        raise OptionError(f"{option('experts')} is of PEFT's files, and llama.cpp stacks experts: leave it out")
    for name in ("tokenizer", "chat_template", "as_trained", "quantize"):
        if getattr(recipe, name) is not None and output == "adapter":
            raise OptionError(f"{option(name)} is of a full model, and this merge makes an adapter: leave it out")
    check_tokenizer(recipe.tokenizer, recipe.vocabulary)
    if recipe.lora_alpha is not None and not any(isinstance(model, Adapter) for model in models):
        raise OptionError(
            f"{option('lora_alpha')} is a setting of adapters, and there is none among the models: leave it out"
        )
    if recipe.reduce_intruders is not None and recipe.base is None:
        raise OptionError(f"{option('reduce_intruders', True)} compares with the base: give it with {option('base')}")


def _name_rank(rank: int | RankSettings) -> str:
    """Return the names of the options that state a rank; on the command line each condition has its own."""
    stated = ["rank"] if isinstance(rank, int) else rank.model_dump()
    typed = [option("rank" if name == "most" else name) for name in stated]
    return either(" and ".join(typed), option("rank"))


def idle_options(recipe: Recipe, output: str) -> list[str]:
    """Return a notice for each option of the recipe that has no effect on this merge."""
    notices = []
    if recipe.layers is not None and not recipe.method.by_depth:
        notices.append(f"{option('layers')} has no effect: {recipe.method.chain} does not depend on depth")
    if "shard_size" in recipe.model_fields_set and output == "adapter":
        notices.append(f"{option('shard_size')} has no effect: an adapter is one file")
    return notices


def apply_out_proj_once(
    recipe: Recipe, models: Sequence[Checkpoint | Adapter]
) -> tuple[tuple[Checkpoint | Adapter, ...], list[str]]:
    """Return the models, with factors that PEFT adds twice counted as the recipe says, and remarks on them."""
    twice = [model for model in models if isinstance(model, Adapter) and added_twice(model)]
    if recipe.out_proj_once:
        if not twice:
            raise OptionError(
                f"{option('out_proj_once', True)} is for LoRA on torch's MultiheadAttention, and there is none: leave "
                f"it out"
            )
        return tuple(out_proj_once(model) if isinstance(model, Adapter) else model for model in models), []
    return tuple(models), [
        f"{model.path}: its factors on the output of torch's MultiheadAttention count twice, as PEFT up to 0.21 adds "
        f"them: use {option('out_proj_once', True)} if what trained it adds them once"
        for model in twice
    ]


def note_assumed_linear(adapters: Sequence[Adapter], base: Checkpoint | None) -> list[str]:
    """Return a notice for each adapter whose layers may be linear or convolutions, as no base shows it."""
    return [
        f"{adapter.path}: its modules are taken for linear layers, which its file does not distinguish from "
        f"convolutions: give {option('base')} if it has any of these"
        for adapter in adapters
        if base is None and any(isinstance(each, ComputedChange) and each.flat for each in adapter.changes.values())
    ]


def same_base(one: str, other: str) -> bool:
    """Return whether two names mean one base: equal but for the owner, the folder, and marks of quantised mirrors."""
    return _bare(one) == _bare(other)


def _bare(name: str) -> str:
    bare = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    return unquantized_name(bare).removeprefix("meta-")


def choose_output(
    recipe: Recipe, models: Sequence[Checkpoint | Adapter], base: Checkpoint | None, known: Collection[str] = ()
) -> tuple[Literal["adapter", "model"], bool]:
    """Choose the output, and whether weights are merged; refuse models that lack the base they need.

    Args:
        recipe: the recipe.
        models: the models.
        base: the base, if there is one.
        known: targets that something stands for where there is no base.

    Returns:
        ``adapter`` or ``model``, and whether weights are merged, and not changes from the base.

    Raises:
        InputError: for models that cannot be merged into such an output without a base.
    """
    method = recipe.method
    adapters = [model for model in models if isinstance(model, Adapter)]
    checkpoints = len(models) - len(adapters)
    of_models = checkpoints + sum(adapter.of_model for adapter in adapters)
    output = recipe.kind or ("model" if of_models else "adapter")
    if output == "adapter" and of_models:
        if base is None and checkpoints == len(models) == 1:
            verb = either("merge extract", "merging.extract")
            raise InputError(
                f"{models[0].path}: is a full model: {verb} makes an adapter of its difference from its base"
            )
        if of_models > checkpoints or base is None or recipe.rank is None:
            raise InputError(
                f"a merge of full checkpoints makes a model: an adapter comes out only when all inputs are adapters, "
                f"or with {option('base')} and {option('rank')}, which factor the change of the base"
            )
        adapters, checkpoints = [], 0
    weights = method.merge_space == "weights" and not (method.factored and not checkpoints)
    if base is None:
        if checkpoints and (method.merge_space == "delta" or method.rescales):
            raise InputError(
                f"{method.chain} merges what each model changed of the model they were all trained from: full "
                f"checkpoints need this model as {option('base')}"
            )
        if checkpoints and adapters:
            raise InputError(f"full checkpoints and adapters can be merged together only with {option('base')}")
        if output == "model" and adapters:
            raise InputError(f"a model can be made of adapters only with {option('base')}")
        if weights and adapters:
            spaces = any("space" in type(link).model_fields for link in method.links())
            instead = f", or use {option('space', 'changes')}" if spaces else ""
            raise InputError(
                f"{method.chain} merges weights, which adapters have only with {option('base')}: give it{instead}"
            )
        if method.needs_base:
            raise InputError(f"{method.chain} looks at the base's weights: give {option('base')}")
        for adapter in adapters:
            adapter.require_base(known)
    return output, weights
