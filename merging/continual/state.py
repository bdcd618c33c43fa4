"""The states of a store as files: each is written by a merge, and read as a source of the next merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from merging.errors import FormatError
from merging.maths.delta import Delta, Dense
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.contract.method import Method
from merging.plan.items import Item, cut_items
from merging.plan.merge_plan import Plan
from merging.plan.recipe import Recipe
from merging.sources import Adapter, Checkpoint
from merging.sources.adapter import TensorNames
from merging.sources.changes import Change, FullChange, LoraChange
from merging.sources.dtypes import DTYPE_NAMES
from merging.sources.small_files import parse_json
from merging.sources.stored import open_safetensors
from merging.storage.output_tensor import OutputTensor

__all__ = ["HeldChange", "count_forms", "open_state", "state_metadata", "step_plan", "value_problems"]

_TENSORS, _DIALECT, _CONFIGURED = "merging_tensors", "merging_dialect", "merging_configured"

_PEFT, _SEVERAL = "PEFT", "several"
"""The names of a state's dialect: for names as PEFT's, and for adapters of different programs."""

_FULL, _DOWN, _UP = "full/", "down/", "up/"


@dataclass(frozen=True, slots=True, eq=False)
class HeldChange(FullChange):
    """A change that is held in full; ``transposed`` for a matrix that is stored as ``[in, out]``."""

    transposed: bool = False

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self.transposed

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        return Dense(self.value.read().to(dtype))


def open_state(path: Path, base: str | None = None) -> Adapter:
    """Open a part of a state as a source of changes, by the base's names.

    ``base`` is the name of the base in adapters. Raises :class:`~merging.errors.FormatError` for other files.
    """
    stored, metadata = open_safetensors(path)
    changes: dict[str, Change] = {}
    written: dict[str, TensorNames] = {}
    try:
        for name, facts in parse_json(metadata[_TENSORS], f"{path}: its list of tensors").items():
            label, kind, transposed = str(facts["label"]), facts["kind"], bool(facts["transposed"])
            if _FULL + name in stored:
                changes[name] = HeldChange(label, kind, stored[_FULL + name], transposed=transposed)
            else:
                down, up = stored[_DOWN + name], stored[_UP + name]
                changes[name] = LoraChange(label, kind, down=down, up=up, scale=1.0, transposed=transposed)
            if "written" in facts:
                stem, names, alpha = facts["written"]
                written[name] = TensorNames(str(stem), tuple(map(str, names)), bool(alpha))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: is not a state of a store: {type(error).__name__}: {error}") from None
    dialect, configured = metadata.get(_DIALECT, _PEFT), _CONFIGURED in metadata
    return Adapter(path, changes, (path,), dialect, base, tensor_names=written, configured=configured)


def value_problems(path: Path) -> list[str]:
    """Return what is wrong with the values of a state's file whose bytes are as they were written."""
    try:
        tensors = [tensor for change in open_state(path).changes.values() for tensor in change.tensors]
    except FormatError as error:
        return [str(error)]
    finite = all(bool(torch.isfinite(tensor.read()).all()) for tensor in tensors)
    return [] if finite else [f"{path}: holds values that are not finite"]


def count_forms(plan: Plan) -> tuple[int, int, int]:
    """Return the largest rank after a step, and the numbers of tensors that are held as factors and in full."""
    downs = [out.shape for out in plan.outs if out.name.startswith(_DOWN)]
    return max((shape[0] for shape in downs), default=0), len(downs), len(plan.outs) - 2 * len(downs)


def state_metadata(plan: Plan) -> dict[str, str]:
    """Return the header of the state that a step writes, which describes its tensors."""
    held = plan.models[0]
    facts: dict[str, dict[str, object]] = {}
    for name, change in (held.changes if isinstance(held, Adapter) else {}).items():
        own = {"label": change.target, "kind": change.kind, "transposed": change.is_transposed(change.shape)}
        facts[name] = own | _names([held.tensor_names.get(name)] if isinstance(held, Adapter) else [])
    for item in plan.items:
        if item.form != "copy":
            facts[item.site.name] = _facts(item) | _names(_written_names(plan, item))
    configured = any(isinstance(model, Adapter) and model.configured for model in plan.models)
    return {_TENSORS: json.dumps(facts), _DIALECT: _dialect(plan.models)} | ({_CONFIGURED: "1"} if configured else {})


def _written_names(plan: Plan, item: Item) -> Iterator[TensorNames | None]:
    """Yield the names of a tensor in the files of adapters that change it whole, which a state keeps."""
    if _dialect(plan.models) == _SEVERAL:
        return
    for model, change in zip(plan.models, item.inputs, strict=True):
        if isinstance(model, Adapter) and isinstance(change, Change):
            name = item.site.name if model.changes.get(item.site.name) is change else change.target
            whole = name in model.changes and change.shape == model.changes[name].shape
            yield model.tensor_names.get(name) if whole else None


def _names(written: Iterable[TensorNames | None]) -> dict[str, object]:
    found = next((each for each in written if each), None)
    return {"written": [found.stem, found.names, found.alpha]} if found else {}


def _dialect(models: Sequence[Checkpoint | Adapter]) -> str:
    """Return the program whose names the adapters among some models have, for an adapter that is exported."""
    adapters = [model for model in models if isinstance(model, Adapter) and model.changes]
    found = {_PEFT if adapter.dialect.startswith(_PEFT) else adapter.dialect for adapter in adapters}
    return found.pop() if len(found) == 1 else _SEVERAL if found else _PEFT


def _facts(item: Item) -> dict[str, object]:
    """Return the tensor's name in adapters, its kind of target there, and whether it is stored transposed."""
    changes = [each for each in item.inputs if isinstance(each, Change)]
    lora = next((each for each in changes if isinstance(each, LoraChange)), None)
    label = changes[0].target if changes else item.site.name
    if lora:
        return {"label": label, "kind": lora.kind, "transposed": lora.is_transposed(item.site.shape)}
    matrix = item.site.kind == "matrix"
    kind = changes[0].kind if changes else "linear" if matrix else "full"
    return {"label": label, "kind": kind, "transposed": matrix and item.site.axis == 0}


def step_plan(held: Adapter | None, plan: Plan, update: Method, key: str, most: int | None) -> Plan:
    """Return the plan of a step, which merges a part of the state and the one model of ``plan``, in float32 or wider.

    A tensor stays factored while the method keeps factors, all models have factors, and the factors take less room than
    the full tensor. The rank of a step is the sum of the ranks, at most ``most``.
    """
    changes = held.changes if held else {}
    low, rank = _plan_factors(changes, plan, update.factored, most)
    items: list[Item] = []
    for item in plan.items:
        name, own = item.site.name, changes.get(item.site.name)
        if item.form == "copy":
            items += _copies(name, own) if own else []
            continue
        kind = DTYPE_NAMES[item.dtype]
        if own:
            kind = "F64" if "F64" in (kind, *(part.dtype_name for part in own.tensors)) else kind
        outs = _factor_outs(item, rank, kind) if name in low else (OutputTensor(_FULL + name, kind, item.site.shape),)
        items.append(Item(item.site, (own, *item.inputs), item.base, outs, "factors" if name in low else "delta"))
    names = {item.site.name for item in plan.items}
    items += [copy for name, own in changes.items() if name not in names for copy in _copies(name, own)]
    state = held or Adapter(Path("nothing"), {}, (), _PEFT)
    return Plan(
        recipe=Recipe(models=("held", *plan.recipe.models), method=update, allow_nonfinite=plan.recipe.allow_nonfinite),
        models=(state, *plan.models),
        base=plan.base,
        keys=("held", key),
        output="model",
        weights=False,
        items=cut_items(sorted(items, key=Item.order), update, weights=False),
        rank=rank,
        notices=plan.notices,
        matched=plan.matched,
    )


def _plan_factors(
    changes: Mapping[str, Change], plan: Plan, keeps_factors: bool, most: int | None
) -> tuple[set[str], int]:
    """Return the tensors that the step holds as factors, and their rank."""
    sums: dict[str, tuple[int, tuple[int, ...]]] = {}
    for item in plan.items:
        own = changes.get(item.site.name)
        given = [change for change in (own, *item.inputs) if change is not None]
        if item.form == "copy" or not keeps_factors or len(item.site.shape) < 2:
            continue
        if all(isinstance(change, LoraChange) and change.low_rank for change in given):
            total = sum(change.rank for change in given if isinstance(change, Change))
            sums[item.site.name] = (min(total, most or total), item.site.shape)
    while True:
        rank = max((total for total, _ in sums.values()), default=0)
        costly = {name for name, (_, shape) in sums.items() if not _worth(rank, shape)}
        if not costly:
            return set(sums), rank
        sums = {name: entry for name, entry in sums.items() if name not in costly}


def _worth(rank: int, shape: Sequence[int]) -> bool:
    """Return whether factors of a rank take less room than the tensor."""
    return rank * (shape[0] + prod(shape[1:])) < prod(shape)


def _factor_outs(item: Item, rank: int, kind: str) -> tuple[OutputTensor, OutputTensor]:
    lora = next(each for each in item.inputs if isinstance(each, LoraChange))
    outputs, inputs, kernel = lora.up.shape[0], lora.down.shape[1], lora.down.shape[2:]
    name = item.site.name
    return (
        OutputTensor(_DOWN + name, kind, (rank, inputs, *kernel)),
        OutputTensor(_UP + name, kind, (outputs, rank, *(1 for _ in kernel))),
    )


def _copies(name: str, own: Change) -> list[Item]:
    """Return items that write a held tensor again as it is."""
    prefixes = (_DOWN, _UP) if isinstance(own, LoraChange) else (_FULL,)
    return [
        Item(
            Site(prefix + name, part.shape),
            (),
            part,
            (OutputTensor(prefix + name, part.dtype_name, part.shape),),
            "copy",
        )
        for prefix, part in zip(prefixes, own.tensors, strict=True)
    ]
