"""Planning a merge of adapters into an adapter: what PEFT's format can carry, and where each change goes in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from merging.errors import InputError
from merging.layers import Stacks
from merging.parameters import all_matching
from merging.plan.items import Form, Item
from merging.plan.resolve import resolve_adapter
from merging.recipe import DTYPES, Recipe
from merging.site import inputs_by_outputs, site_of
from merging.sources import Adapter, Checkpoint
from merging.sources.adapter import Change, LoraChange
from merging.sources.stored import DTYPE_NAMES, Out, Stored

__all__ = ["adapter_items", "adapter_targets"]

PREFIX = "base_model.model."
"""What PEFT puts before the path of every module."""


def adapter_targets(
    adapters: Sequence[Adapter], base: Checkpoint | None
) -> tuple[dict[str, tuple[Change | None, ...]], dict[str, str], list[str]]:
    """The changes at each target, one entry an adapter; the name each target has in PEFT's files; matching lines.

    With a base, targets are its tensors on disk; without one, the adapters' own names, which must then agree.
    """
    matched: list[str] = []
    named: list[dict[str, Change]] = []
    labels: dict[str, str] = {}
    for adapter in adapters:
        if base is None:
            changes = adapter.changes
        else:
            changes, line = resolve_adapter(adapter, _known(base, adapter), base.config)
            matched.append(line)
        for name, change in changes.items():
            labels.setdefault(name, change.target)
        named.append(changes)
    if base is None:
        _refuse_drifted(adapters)
    return {name: tuple(changes.get(name) for changes in named) for name in labels}, labels, matched


def _known(base: Checkpoint, adapter: Adapter) -> dict[str, Stored]:
    heads = {name: stored for name in adapter.changes if (stored := base.lookup(name)) is not None}
    return {**base.tensors, **heads}


def _refuse_drifted(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that name the same modules under different prefixes, whose changes would be put side by side."""
    first = adapters[0].changes
    for adapter in adapters[1:]:
        if not first.keys().isdisjoint(adapter.changes):
            continue
        for name in adapter.changes:
            other = next((o for o in first if o.endswith("." + name) or name.endswith("." + o)), None)
            if other:
                raise InputError(
                    f"{adapters[0].path} has {other} where {adapter.path} has {name}: these look like the same module "
                    f"under the names of two library versions: give the base with --base, so that both can be matched"
                )


def adapter_items(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    base: Checkpoint | None,
    targets: dict[str, tuple[Change | None, ...]],
    labels: dict[str, str],
    stacks: Stacks,
    rank_steps: Sequence[int] = (),
) -> tuple[list[Item], int]:
    """The items, and the rank of the factors: as asked for, or one of ``rank_steps`` (or any) that loses nothing."""
    left = all_matching(recipe.exclude, targets)
    targets = {name: changes for name, changes in targets.items() if name not in left}
    kind = DTYPES[recipe.dtype] if recipe.dtype else _widest(targets.values())
    shapes = {name: _shape(name, changes, adapters, base) for name, changes in targets.items()}
    low = {name for name, changes in targets.items() if _is_lora(changes)}
    rank = _rank(recipe, [(targets[name], shapes[name]) for name in low], rank_steps)
    _check_biases(targets, low, labels, adapters)
    turned = inputs_by_outputs({name: stored.shape for name, stored in base.tensors.items()}) if base else set()
    items = []
    for name, changes in targets.items():
        transposed = any(each.is_transposed(shapes[name]) for each in changes if each)
        site = site_of(name, shapes[name], stacks, transposed or name in turned)
        stored = base.lookup(name) if base else None
        outs = _outs(labels[name], changes, shapes[name], rank, kind)
        form: Form = "factors" if name in low else "delta" if _is_bias(changes) else "dense"
        items.append(Item(site, changes, stored, outs, form))
    return items, rank


def _widest(targets: Iterable[tuple[Change | None, ...]]) -> str:
    dtypes = {t.dtype for changes in targets for change in changes if change for t in change.tensors}
    widest = torch.float16 if dtypes == {torch.float16} else torch.bfloat16
    for dtype in sorted(dtypes, key=str):
        widest = torch.promote_types(widest, dtype)
    return DTYPE_NAMES[widest]


def _shape(
    name: str, changes: tuple[Change | None, ...], adapters: Sequence[Adapter], base: Checkpoint | None
) -> tuple[int, ...]:
    stored = base.lookup(name) if base else None
    if stored is not None:
        return stored.shape
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
    return all(change.kind in ("linear", "embedding", "conv") for change in changes if change)


def _is_bias(changes: tuple[Change | None, ...]) -> bool:
    return all(change.kind == "bias" for change in changes if change)


def _rank(
    recipe: Recipe, modules: list[tuple[tuple[Change | None, ...], tuple[int, ...]]], steps: Sequence[int]
) -> int:
    """The sum of the ranks where it is largest, or the rank asked for up to what can be of use in any module.

    More than the sum is of use where the merged change is not the sum of the changes, or one of them came in full.
    """
    default = most = 0
    for changes, shape in modules:
        brought = [change for change in changes if change]
        total, full = sum(change.rank for change in brought), min(shape[0], torch.Size(shape[1:]).numel())
        summed = recipe.method.factored and all(change.low_rank for change in brought)
        default = max(default, min(total, full))
        most = max(most, min(total, full) if summed else full)
    if recipe.rank:
        return min(most, recipe.rank)
    return next((step for step in steps if step >= default), default)


def _check_biases(
    targets: dict[str, tuple[Change | None, ...]], low: set[str], labels: dict[str, str], adapters: Sequence[Adapter]
) -> None:
    """PEFT carries changes of biases only as ``lora_bias``, of every module that has factors or of none."""
    biases = {_module(labels[name]): name for name, changes in targets.items() if _is_bias(changes)}
    modules = {_module(labels[name]) for name in low}
    if biases and biases.keys() != modules:
        odd = sorted(biases.keys() ^ modules)[0]
        raise InputError(
            f"{adapters[0].path} and the others change biases ({odd} is one that has only a bias or only factors), and "
            f"PEFT's format carries biases only of all adapted modules: make a model with --as model --base BASE"
        )


def _module(label: str) -> str:
    return label.rpartition(".")[0]


def _outs(
    label: str, changes: tuple[Change | None, ...], shape: tuple[int, ...], rank: int, kind: str
) -> tuple[Out, ...]:
    module = PREFIX + _module(label)
    change = next(each for each in changes if each)
    if not _is_lora(changes):
        name = f"{module}.lora_B.bias" if _is_bias(changes) else PREFIX + label
        return (Out(name, kind, shape),)
    if isinstance(change, LoraChange):
        outputs, inputs, kernel = change.up.shape[0], change.down.shape[1], change.down.shape[2:]
    else:
        (outputs, inputs), kernel = shape[::-1] if change.is_transposed(shape) else shape, ()
    if change.kind == "embedding":
        names = f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    else:
        names = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    return (
        Out(names[0], kind, (rank, inputs, *kernel)),
        Out(names[1], kind, (outputs, rank, *(1 for _ in kernel))),
    )
