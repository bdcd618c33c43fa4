"""Alignment of models: the tensors that any of them changes, under one name each, ready to be read in pieces."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Literal, TypedDict

from typing_extensions import Unpack

from merging.display.progress import Progress
from merging.engine.download import download_plan
from merging.engine.tiles import Tiler
from merging.errors import InputError, OptionError, option
from merging.hub.open_model import open_model, require_full
from merging.maths.delta import Delta, Dense
from merging.maths.layers import Stacks
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.patterns import all_matching
from merging.maths.site import site_of
from merging.plan import Item, Plan, plan_of
from merging.plan.checks import check_bases, check_packed
from merging.plan.items import cut_items
from merging.plan.names.targets import adapter_targets, common_shape
from merging.plan.recipe import Recipe
from merging.plan.recipe_values import make_recipe
from merging.plan.stacks import mark_experts
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change
from merging.sources.stored import Stored

__all__ = [
    "MEMORY",
    "AlignOptions",
    "ModelLike",
    "align",
    "factored",
    "matrix_sides",
    "read_change",
    "row_blocks",
    "select_models",
]

MEMORY = 1 << 30
"""The most bytes that a comparison takes by default, above the memory of the imports."""

ModelLike = str | Path | Adapter | Checkpoint
"""An opened model, or its path or address."""


class AlignOptions(TypedDict, total=False):
    """The options of a comparison: fields of :class:`~merging.plan.recipe.Recipe` about the models."""

    base: ModelLike | None
    exclude: str | Sequence[str] | None
    on_mismatch: Literal["error", "base"] | None
    allow_different_bases: bool | None
    lora_alpha: float | None
    dequantise: bool | None
    dequantize: bool | None


def align(
    models: Sequence[ModelLike],
    *,
    reads_base: bool = False,
    progress: Progress | None = None,
    **options: Unpack[AlignOptions],
) -> Plan:
    """Align the changes of models, as the plan of a sum that is never computed.

    Args:
        models: The models. Models on the Hub are downloaded.
        reads_base: Whether the base's tensors are part of the plan even where no change needs them.
        progress: Receives the bytes downloaded so far and in total.
        **options: Fields of :class:`~merging.plan.recipe.Recipe` about the models: ``base``, ``exclude``,
            ``on_mismatch``, ``allow_different_bases``, ``lora_alpha``, ``dequantise``.

    Returns:
        The plan. Its items are the tensors that some model changes, sorted by layer.

    Raises:
        merging.errors.InputError: For models that do not fit together, and for full checkpoints without a base.
        merging.errors.OptionError: For other options.
    """
    if unknown := options.keys() - AlignOptions.__annotations__.keys():
        raise OptionError(f"a comparison has no option {sorted(unknown)[0]!r}")
    if not models:
        raise InputError("there is nothing to compare: name at least one model")
    stated = {name: value for name, value in options.items() if value is not None}
    base = options.get("base")
    if isinstance(base, Checkpoint):
        stated["base"] = str(base.path)
    names = [model.path if isinstance(model, (Adapter, Checkpoint)) else model for model in models]
    stated |= {"models": [str(name) for name in names], "method": "task_arithmetic", "allow_nonfinite": True}
    recipe = make_recipe(stated, "compare")
    opened = [_open(model, recipe) for model in models]
    if base is None:
        plan = _without_base(recipe, opened)
    else:
        opened_base = _open(base, recipe)
        full = require_full(opened_base, opened_base.path, option("base"))
        plan = plan_of(recipe.model_copy(update={"kind": "model"}), opened, full)
    items = [item for item in plan.items if item.form != "copy" and item.numel]
    if not items:
        raise InputError("there is nothing to compare: no tensor is left")
    if not reads_base:
        items = [item if _needs_base(item) else replace(item, base=None) for item in items]
    items.sort(key=lambda item: (item.site.position.layer is None, item.site.position.layer or 0))
    return download_plan(replace(plan, items=tuple(items)), (), progress=progress)


def _open(model: ModelLike, recipe: Recipe) -> Adapter | Checkpoint:
    if isinstance(model, (Adapter, Checkpoint)):
        return model
    try:
        return open_model(model, recipe.lora_alpha, recipe.dequantise)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise InputError(f"{model}: more files are open than the system allows: raise it with ulimit -n") from None


def _needs_base(item: Item) -> bool:
    return any(isinstance(each, Stored) or (each is not None and each.needs_base) for each in item.inputs)


def _without_base(recipe: Recipe, models: Sequence[Adapter | Checkpoint]) -> Plan:
    adapters = [model for model in models if isinstance(model, Adapter)]
    full = next((model for model in models if isinstance(model, Checkpoint)), None)
    if full is not None:
        raise InputError(
            f"{full.path}: full checkpoints are compared by their changes from the model they were trained from: give "
            f"it with {option('base')}"
        )
    check_bases(adapters, recipe.allow_different_bases)
    check_packed(adapters, None, recipe.allow_different_bases)
    for adapter in adapters:
        adapter.require_base()
    targets = adapter_targets(adapters, None)
    left = all_matching(recipe.exclude, targets.changes)
    stacks = Stacks.from_names(targets, complete=False)
    items = []
    for name, changes in targets.changes.items():
        if name in left:
            continue
        shape = common_shape(name, changes, adapters)
        turned = any(each.is_transposed(shape) for each in changes if each)
        site = mark_experts(site_of(name, shape, stacks, turned), changes)
        items.append(Item(site, changes, None, (), "dense"))
    keys = tuple(map(str, range(len(adapters))))
    notices = tuple(notice for adapter in adapters for notice in adapter.notices)
    return Plan(
        recipe=recipe,
        models=tuple(adapters),
        base=None,
        keys=keys,
        output="adapter",
        weights=False,
        items=cut_items(items, recipe.method, weights=False),
        notices=notices,
    )


def factored(item: Item) -> bool:
    """Whether all changes of a tensor are factors."""
    return all(each is None or (isinstance(each, Change) and each.low_rank) for each in item.inputs)


def matrix_sides(item: Item) -> tuple[int, int, int]:
    """Return the number of matrices in a tensor, and the two sides of each."""
    shape = item.site.shape
    if item.site.kind == "experts":
        return shape[0], shape[1], prod(shape[2:])
    return 1, (shape[0] if shape else 1), prod(shape[1:])


def select_models(plan: Plan, item: Item, slots: Sequence[int]) -> tuple[Plan, Item]:
    """Return the plan and the item with only some of the models."""
    models, keys = tuple(plan.models[slot] for slot in slots), tuple(plan.keys[slot] for slot in slots)
    (part,) = cut_items(
        [replace(item, inputs=tuple(item.inputs[slot] for slot in slots))], plan.recipe.method, plan.weights
    )
    return replace(plan, models=models, keys=keys), part


def row_blocks(plan: Plan, item: Item, slots: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield the changes of a tensor by blocks of rows, ``[models, elements]``. A block is valid until the next."""
    some, part = select_models(plan, item, slots)
    for tile in Tiler(some, device).tiles(part, 0, part.numel):
        yield tile.stack.dense().flatten(1)


def read_change(tiler: Tiler, item: Item, slot: int) -> Delta:
    """Return one model's whole change of a tensor, on the tiler's device."""
    stored = item.inputs[slot]
    if not isinstance(stored, Stored):
        return tiler.change(item, slot)
    assert item.base is not None
    dtype = item.dtype
    value = stored.read().to(dtype)
    return Dense(value.sub_(item.base.read().to(dtype)).to(tiler.device))
