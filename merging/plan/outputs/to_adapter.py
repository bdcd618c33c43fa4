"""Planning a merge of adapters into an adapter: its rank, its type, and the item of each target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from merging.errors import InputError, OptionError, option
from merging.maths.layers import Stacks
from merging.maths.patterns import all_matching
from merging.maths.shapes import Shape
from merging.maths.site import Site, inputs_by_outputs, site_of
from merging.methods.blocks import scales_at
from merging.plan.checks import check_related, note_assumed_linear
from merging.plan.inputs.task_heads import NO_HEADS, TaskHeads
from merging.plan.items import Item
from merging.plan.names.labels import make_denoiser_labels, make_peft_labels
from merging.plan.names.output_names import are_whole, choose_names
from merging.plan.names.targets import Targets, adapter_targets, common_shape
from merging.plan.outputs.experts_apart import check_experts_apart
from merging.plan.outputs.exporter import Changes, Exporter, is_experts, is_lora
from merging.plan.outputs.gguf_exporter import GgufExporter
from merging.plan.outputs.named_exporter import NamedExporter
from merging.plan.outputs.peft_exporter import PeftExporter
from merging.plan.outputs.planned import PlannedOutput
from merging.plan.rank_settings import RankSettings
from merging.plan.recipe import DTYPES, Recipe
from merging.plan.stacks import find_stacks, mark_experts
from merging.sources import Adapter, Checkpoint

__all__ = ["plan_adapter"]


def plan_adapter(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    base: Checkpoint | None,
    *,
    weights: bool,
    heads: TaskHeads = NO_HEADS,
    rank_steps: Sequence[int] = (),
    chosen: Mapping[str, int] | None = None,
) -> PlannedOutput:
    """Plan a merged adapter.

    Args:
        recipe: the recipe. Its rank is used if it states one, else a rank that loses nothing.
        adapters: the adapters.
        base: the base, if there is one.
        weights: whether weights are merged, and not changes from the base.
        heads: stand for heads that no base has.
        rank_steps: the ranks that an adapter in PEFT's files may have; any if there are none.
        chosen: ranks that were chosen from the values, by target; a target of rank 0 is left out.

    Raises:
        InputError: for adapters that do not fit together, and for changes that the output's format cannot hold.
    """
    targets = adapter_targets(adapters, base, heads)
    notices = [] if base else check_related(adapters, targets.changes.values(), recipe.allow_different_bases)
    notices += note_assumed_linear(adapters, base)
    stacks, guess = find_stacks(recipe, adapters, base, targets)
    excluded = all_matching(recipe.exclude, [*targets.changes, *heads.excluded])
    included = {name: changes for name, changes in targets.changes.items() if name not in excluded}
    if targets.changes and not included:
        raise OptionError("all changes are excluded, so that none is left to write")
    merged = {name: changes for name, changes in included.items() if not chosen or chosen.get(name, 1)}
    if chosen is not None and not merged:
        raise InputError(
            "the merged change is 0 in all tensors that could change, so that there is nothing to write: are the "
            "models equal to their base, or is their scale or weight 0?"
        )
    sites = _find_sites(included, targets, adapters, base, stacks)
    scales = {name: scales_at(recipe.method, sites[name], len(adapters)) for name in merged}
    touched = {name: _touching(changes, scales[name]) for name, changes in merged.items()}
    merged = {name: changes for name, changes in touched.items() if any(changes)}
    if not merged:
        raise OptionError("the weights of all blocks are 0, so that no change is left to write")
    exporter, names_notices = _choose_exporter(
        recipe, adapters, base, targets, merged=merged, rank_steps=rank_steps, chosen=chosen
    )
    resolver = targets.resolver
    items: list[Item] = []
    for name, changes in merged.items():
        stored = resolver.find_stored(name) if resolver else heads.tensors.get(name)
        if base is not None and stored is None:
            _refuse_in_pieces(name, changes, weights, base)
        item = replace(exporter.item(sites[name], changes, stored), scales=scales[name])
        items.append(replace(item, base=stored) if recipe.method.needs_base else item)
    exporter.check(items)
    return PlannedOutput(
        items=items,
        untouched=[site for name, site in sites.items() if name not in merged],
        matched=targets.matched,
        notices=[*notices, *names_notices],
        guess=guess,
        rank=exporter.rank,
        ranks=exporter.ranks,
        format=exporter.format,
        header=exporter.header,
        constants=exporter.constants(),
    )


def _touching(changes: Changes, scales: Sequence[float]) -> Changes:
    """Return the changes but for those that are multiplied by 0."""
    if not scales:
        return changes
    return tuple(change if scale else None for change, scale in zip(changes, scales, strict=True))


def _find_sites(
    included: Mapping[str, Changes],
    targets: Targets,
    adapters: Sequence[Adapter],
    base: Checkpoint | None,
    stacks: Stacks,
) -> dict[str, Site]:
    """Return the site of each target."""
    turned = inputs_by_outputs({name: stored.shape for name, stored in base.tensors.items()}) if base else set()
    sites = {}
    for name, changes in included.items():
        shape = _shape(name, changes, targets, adapters)
        transposed = name in turned or any(each.is_transposed(shape) for each in changes if each)
        on_disk = targets.resolver.on_disk(name) if targets.resolver else name
        sites[name] = mark_experts(site_of(name, shape, stacks, transposed, on_disk), changes)
    return sites


def _choose_exporter(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    base: Checkpoint | None,
    targets: Targets,
    *,
    merged: Mapping[str, Changes],
    rank_steps: Sequence[int],
    chosen: Mapping[str, int] | None,
) -> tuple[Exporter, list[str]]:
    """Return the exporter of the file's format, and remarks on the choice of names."""
    shapes = {name: _shape(name, changes, targets, adapters) for name, changes in merged.items()}
    known = {name: stored.shape for name, stored in base.tensors.items()} if base else shapes
    names, notices = choose_names(recipe, adapters, targets.placed, shapes, known if base else None)
    factored = {name: shapes[name] for name, changes in merged.items() if is_lora(changes)}
    if names is not None:
        in_full = names.kept_in_full(known)
        factored = {name: shape for name, shape in factored.items() if name not in in_full}
    steps = () if names or recipe.format == "gguf" else rank_steps
    if not recipe.rank:
        _refuse_full_rank(merged, factored, adapters)
    ranks = chosen
    if ranks is None:
        ranks = _choose_ranks(recipe, {name: (merged[name], shape) for name, shape in factored.items()}, steps)
    ranks = {name: ranks[name] for name in factored}
    dtype_name = DTYPES[recipe.dtype] if recipe.dtype else _widest_dtype(merged.values())
    if recipe.format == "gguf":
        exporter: Exporter = GgufExporter(
            base,
            factored=factored,
            targets=merged,
            ranks=ranks,
            dtype_name=dtype_name,
            resolver=targets.resolver,
        )
        return exporter, notices
    apart = recipe.experts == "apart"
    if apart:
        check_experts_apart(targets.labels.values(), any(map(is_experts, merged.values())))
    if names is not None:
        return NamedExporter(
            names, known, factored, ranks=ranks, dtype_name=dtype_name, based=base is not None
        ), notices
    labels = targets.labels
    if not all(adapter.names_modules for adapter in adapters):
        labels = make_peft_labels(adapters, known, list(merged), base is not None)
    elif base is not None and not are_whole(targets.placed, known):
        labels = make_denoiser_labels(known, merged) or labels
    peft_exporter = PeftExporter(
        labels,
        merged,
        factored=factored,
        ranks=ranks,
        dtype_name=dtype_name,
        apart=apart,
        resolver=targets.resolver,
    )
    peft_exporter.check_biases(merged, adapters)
    return peft_exporter, notices


def _shape(name: str, changes: Changes, targets: Targets, adapters: Sequence[Adapter]) -> Shape:
    return targets.resolver.shape(name) if targets.resolver else common_shape(name, changes, adapters)


def _refuse_in_pieces(name: str, changes: Changes, weights: bool, base: Checkpoint) -> None:
    """Refuse changes that need a tensor of the base where several tensors on the disk hold its pieces."""
    reason = next((each.needs_base for each in changes if each and each.needs_base), None)
    if weights or reason:
        raise InputError(
            f"{name} is in several tensors of {base.path}, and {reason or 'this method merges weights'}: make a model "
            f"with {option('kind', 'model')}"
        )


def _widest_dtype(targets: Iterable[Changes]) -> str:
    """Return the name of the widest type among the adapters' tensors, bfloat16 at least unless all are float16."""
    tensors = (t for changes in targets for change in changes if change for t in change.tensors if t.floating)
    names = {tensor.dtype_name for tensor in tensors}
    if "F64" in names:
        return "F64"
    if "F32" in names or names == {"F16", "BF16"}:
        return "F32"
    return "F16" if names == {"F16"} else "BF16"


def _choose_ranks(recipe: Recipe, modules: Mapping[str, tuple[Changes, Shape]], steps: Sequence[int]) -> dict[str, int]:
    """Return the rank of each target: the sum of the ranks (or the method's own) where it is largest, or as asked for.

    It is not larger than what can be of use. More than the sum is of use where the merged change is not the sum of the
    changes, or an adapter holds one in full. Conditions on ranks need the values: then these are upper bounds.
    """
    default, most = 0, dict.fromkeys(modules, 0)
    for name, (changes, shape) in modules.items():
        given = [change for change in changes if change]
        matrix = shape[1:] if is_experts(changes) else (shape[0], prod(shape[1:]))
        total, full = recipe.method.merged_rank([change.rank for change in given]), min(matrix)
        summed = recipe.method.factored and all(change.low_rank for change in given)
        default = max(default, min(total, full))
        most[name] = min(total, full) if summed else full
    if isinstance(recipe.rank, RankSettings):
        limit = recipe.rank.most
        return {name: min(each, limit) if limit else each for name, each in most.items()}
    if recipe.rank:
        rank = min(max(most.values(), default=0), recipe.rank)
    else:
        rank = next((step for step in steps if step >= default), default)
    return dict.fromkeys(modules, rank)


def _refuse_full_rank(
    targets: Mapping[str, Changes], factored: Mapping[str, Shape], adapters: Sequence[Adapter]
) -> None:
    """Refuse to choose a rank for changes of full rank: factors hold only a part of them."""
    for name in factored:
        for change, adapter in zip(targets[name], adapters, strict=True):
            if change and not change.rank and not change.low_rank:
                raise InputError(
                    f"{adapter.path}: what a {adapter.dialect} adapter changes in {name} has full rank, and a LoRA "
                    f"holds as much of it as its own rank allows: choose one with {option('rank')}, or make a model "
                    f"with {option('kind', 'model')}"
                )
