"""Planning a merge of adapters into an adapter: what PEFT's format can carry, and where each change goes in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from merging.errors import InputError
from merging.maths.layers import Stacks
from merging.maths.parameters import all_matching
from merging.maths.site import Site, inputs_by_outputs, site_of
from merging.plan.apart import check_apart, expert_placings
from merging.plan.exports import Exporter
from merging.plan.items import Constant, Item, ItemForm
from merging.plan.labels import peft_labels
from merging.plan.names import choose_names
from merging.plan.outs import PREFIX, Paths, factors, module_of
from merging.plan.recipe import DTYPES, AdapterFormat, Recipe
from merging.plan.resolve import Resolver
from merging.plan.sites import mark_experts
from merging.plan.targets import Targets
from merging.sources import Adapter, Checkpoint
from merging.sources.adapter import Change
from merging.sources.stored import DTYPE_NAMES, Stored
from merging.sources.token_rows import TokenRows, TokenTable
from merging.storage.output_tensor import OutputTensor

__all__ = ["AdapterItems", "adapter_items", "common_shape"]


@dataclass(frozen=True, slots=True)
class AdapterItems:
    """What a merged adapter consists of: its ``items`` and ``constants``, and the ``rank`` of the factors.

    ``format`` is what the form of its file is called, ``header`` whose entries the file's header has, if it has any;
    ``notices`` say how these were chosen.
    """

    items: list[Item]
    rank: int
    constants: tuple[Constant, ...] = ()
    format: str = "peft"
    header: AdapterFormat | None = "peft"
    notices: tuple[str, ...] = ()


def adapter_items(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    base: Checkpoint | None,
    targets: Targets,
    stacks: Stacks,
    weights: bool,
    rank_steps: Sequence[int] = (),
) -> AdapterItems:
    """What the merged adapter consists of.

    The rank is as asked for, or one that loses nothing: for an adapter of PEFT's one of ``rank_steps``, if there are
    any.
    """
    left = all_matching(recipe.exclude, [*targets.changes, *targets.heads.excluded])
    merged = {name: changes for name, changes in targets.changes.items() if name not in left}
    labels = targets.labels
    kind = DTYPES[recipe.dtype] if recipe.dtype else _widest(merged.values())
    resolver = targets.resolver
    shapes = {
        name: resolver.shape(name) if resolver else common_shape(name, changes, adapters)
        for name, changes in merged.items()
    }
    named = {name: stored.shape for name, stored in base.tensors.items()} if base else shapes
    names, notices = choose_names(recipe, adapters, targets.placed, shapes, named if base else None)
    low = {name for name, changes in merged.items() if _is_lora(changes)}
    low -= names.kept_in_full(named) if names else set()
    if not recipe.rank:
        _refuse_full_rank(merged, low, adapters)
    rank = _rank(recipe, [(merged[name], shapes[name]) for name in low], () if names else rank_steps)
    if recipe.experts == "apart":
        check_apart(labels.values(), any(map(_is_experts, merged.values())))
    exporter = None
    if names is not None:
        factored = {name: shape for name, shape in shapes.items() if name in low}  # in an order: low has none
        exporter = Exporter(names, named, factored, rank, kind, base is not None)
    elif not all(adapter.dialect.startswith("PEFT") for adapter in adapters):
        labels = peft_labels(adapters, named, list(merged), base is not None)
    if exporter is None:
        _check_biases(merged, low, labels, adapters)
    turned = inputs_by_outputs({name: stored.shape for name, stored in base.tensors.items()}) if base else set()
    paths = Paths((labels[name] for name in low), (labels[name] for name in low if _is_experts(merged[name])))
    items = []
    for name, changes in merged.items():
        transposed = any(each.is_transposed(shapes[name]) for each in changes if each)
        site = site_of(name, shapes[name], stacks, transposed or name in turned, _on_disk(name, targets.resolver))
        site = mark_experts(site, changes)
        stored = targets.resolver.stored(name) if targets.resolver else targets.heads.tensors.get(name)
        if base is not None and stored is None:
            _refuse_in_pieces(name, changes, weights, base)
        added = _is_bias(changes) or (exporter is not None and _is_lora(changes))
        form: ItemForm = "factors" if name in low else "delta" if added else "dense"
        if exporter is not None:
            items.append(exporter.item(site, changes, stored, form))
            continue
        if stored is not None and all(isinstance(each, TokenRows) for each in changes if each):
            items.append(_token_item(site, changes, stored, labels[name], kind, alone=not low))
            continue
        if recipe.experts == "apart" and form == "factors" and _is_experts(changes):
            first = next(each for each in changes if each)
            placings = expert_placings(name, first, shapes[name], rank, kind, targets.resolver)
            outs = tuple(out for each in placings for out in (each.down, each.up) if out)
            items.append(Item(site, changes, stored, outs, form, placings=placings))
            continue
        written = 0.5 if form == "factors" and paths.applied_twice(labels[name]) else 1.0
        outs = _outs(labels[name], changes, shapes[name], rank, kind, paths)
        items.append(Item(site, changes, stored, outs, form, written))
    if exporter is not None and names is not None:
        return AdapterItems(items, rank, exporter.constants(), names.format, names.header, tuple(notices))
    _check_tokens(items, rank)
    if not low and all(item.form == "dense" and not isinstance(item.base, TokenTable) for item in items):
        raise InputError(
            "the adapters hold tensors in full and no factors, and PEFT reads these only beside factors: make a model "
            "with --as model"
        )
    return AdapterItems(items, rank, notices=tuple(notices))


def _token_item(
    site: Site, changes: tuple[Change | None, ...], table: Stored, label: str, kind: str, alone: bool
) -> Item:
    """The rows that any adapter trained, as a table of their own."""
    rows = [each for each in changes if isinstance(each, TokenRows)]
    indices = sorted({index for each in rows for index in each.indices})
    among = tuple(each.among(indices) if isinstance(each, TokenRows) else None for each in changes)
    shape = (len(indices), site.shape[1])
    out = OutputTensor(
        f"{PREFIX}{module_of(label)}.{'' if alone else 'token_adapter.'}trainable_tokens_delta", kind, shape
    )
    return Item(replace(site, shape=shape), among, TokenTable(table, indices), (out,), "dense")


def _check_tokens(items: Sequence[Item], rank: int) -> None:
    """PEFT's format for rows of tokens without factors beside them has one list of rows, and nothing else."""
    tables = [item.base for item in items if isinstance(item.base, TokenTable)]
    if tables and not rank and (len(tables) < len(items) or len({table.indices for table in tables}) > 1):
        raise InputError(
            "the adapters hold rows of tokens and no factors, and PEFT's format keeps such rows of one module only: "
            "make a model with --as model"
        )


def _on_disk(name: str, resolver: Resolver | None) -> str:
    return name if resolver is None else resolver.on_disk(name)


def _refuse_in_pieces(name: str, changes: tuple[Change | None, ...], weights: bool, base: Checkpoint) -> None:
    """Refuse what wants a tensor of the base that lies there in pieces."""
    reason = next((each.needs_base for each in changes if each and each.needs_base), None)
    if weights or reason:
        raise InputError(
            f"{name} lies in several tensors of {base.path}, and {reason or 'this method merges weights'}: make a "
            f"model with --as model"
        )


def _widest(targets: Iterable[tuple[Change | None, ...]]) -> str:
    dtypes = {t.dtype for changes in targets for change in changes if change for t in change.tensors if t.floating}
    widest = torch.float16 if dtypes == {torch.float16} else torch.bfloat16
    for dtype in sorted(dtypes, key=str):
        widest = torch.promote_types(widest, dtype)
    return DTYPE_NAMES[widest]


def common_shape(name: str, changes: Sequence[Change | None], adapters: Sequence[Adapter]) -> tuple[int, ...]:
    """The shape of the tensor that adapters (each at the place of its change) change, as they tell it.

    Raises :class:`~merging.errors.InputError` where they do not agree.
    """
    first, *others = [(change, adapter) for change, adapter in zip(changes, adapters, strict=True) if change]
    for change, adapter in others:
        if not change.fits(first[0].shape):
            raise InputError(
                f"{name} is {first[0].shape} in {first[1].path} and {change.shape} in {adapter.path}: they were "
                f"trained on bases of different sizes"
            )
    return first[0].shape


def _is_lora(changes: tuple[Change | None, ...]) -> bool:
    """Whether the target's merged change goes into factors: no adapter brings it in full."""
    return all(change.kind in ("linear", "embedding", "conv", "experts") for change in changes if change)


def _is_experts(changes: tuple[Change | None, ...]) -> bool:
    return any(change.kind == "experts" for change in changes if change)


def _is_bias(changes: tuple[Change | None, ...]) -> bool:
    return all(change.kind == "bias" for change in changes if change)


def _rank(
    recipe: Recipe, modules: list[tuple[tuple[Change | None, ...], tuple[int, ...]]], steps: Sequence[int]
) -> int:
    """The sum of the ranks where it is largest, or the rank asked for up to what can be of use in any module.

    More than the sum is of use where the merged change is not the sum of the changes, or one of them came in full.
    """
    if not modules:
        return 0
    default = most = 0
    for changes, shape in modules:
        brought = [change for change in changes if change]
        matrix = shape[1:] if _is_experts(changes) else (shape[0], torch.Size(shape[1:]).numel())
        total, full = sum(change.rank for change in brought), min(matrix)
        summed = recipe.method.factored and all(change.low_rank for change in brought)
        default = max(default, min(total, full))
        most = max(most, min(total, full) if summed else full)
    if recipe.rank:
        return min(most, recipe.rank)
    return next((step for step in steps if step >= default), default)


def _refuse_full_rank(
    targets: dict[str, tuple[Change | None, ...]], low: set[str], adapters: Sequence[Adapter]
) -> None:
    """Refuse to choose a rank for changes that have none: of a full matrix, factors hold what their rank allows."""
    for name, changes in targets.items():
        for change, adapter in zip(changes, adapters, strict=True):
            if name in low and change and not change.rank and not change.low_rank:
                raise InputError(
                    f"{adapter.path}: what a {adapter.dialect} adapter changes in {name} has full rank, and a LoRA "
                    f"holds as much of it as its own rank allows: choose one with --rank, or make a model with "
                    f"--as model"
                )


def _check_biases(
    targets: dict[str, tuple[Change | None, ...]], low: set[str], labels: dict[str, str], adapters: Sequence[Adapter]
) -> None:
    """PEFT carries changes of biases only as ``lora_bias``, of every module that has factors or of none."""
    biases = {module_of(labels[name]): name for name, changes in targets.items() if _is_bias(changes)}
    modules = {module_of(labels[name]) for name in low}
    if biases and biases.keys() != modules:
        odd = sorted(biases.keys() ^ modules)[0]
        raise InputError(
            f"{adapters[0].path} and the others change biases ({odd} is one that has only a bias or only factors), and "
            f"PEFT's format carries biases only of all adapted modules: make a model with --as model --base BASE"
        )


def _outs(
    label: str, changes: tuple[Change | None, ...], shape: tuple[int, ...], rank: int, kind: str, paths: Paths
) -> tuple[OutputTensor, ...]:
    if _is_lora(changes):
        return factors(paths.of(label), next(each for each in changes if each), shape, rank, kind)
    return (OutputTensor(PREFIX + (f"{module_of(label)}.lora_B.bias" if _is_bias(changes) else label), kind, shape),)
