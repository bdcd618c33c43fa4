"""Merging tensors that are already in memory, on whatever device: no files, no prints, gradients go through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merging.engine.unit import decomposing, feed
from merging.errors import InputError, OptionError
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.layers import Stacks
from merging.maths.parameters import all_matching
from merging.maths.reductions import Reduction
from merging.maths.site import Site, inputs_by_outputs, site_of
from merging.methods import chain
from merging.methods.contract.method import Method, Statistics
from merging.methods.contract.places import check_places
from merging.methods.contract.wrapper import Unwrapped, unwrap_outer
from merging.output.peft_config import lora_config
from merging.sources.adapter import LoraChange
from merging.sources.loose_factors import refuse_factors
from merging.sources.peft import peft_changes
from merging.sources.stored import MappedTensor

__all__ = ["merge_deltas", "merge_state_dicts", "peft_deltas", "peft_state_dict"]


def merge_state_dicts(
    models: Sequence[Mapping[str, Tensor]],
    *,
    method: str | Method,
    base: Mapping[str, Tensor] | None = None,
    layers: int | None = None,
    exclude: Sequence[str] = (),
    transposed: Sequence[str] = (),
    keys: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge full models given as state dicts: the same names, shapes and devices, and what comes out has them too.

    Computed in float32 (float64 for float64 tensors) and cast to the types of ``base``, or of the first model.
    Tensors that hold no floating-point numbers are the base's. Coefficients among ``parameters`` may be tensors, and
    gradients reach them. ``layers`` is the number of blocks where the names do not tell; tensors that ``exclude`` names
    (or part of their names, or wildcards) stay the base's. ``transposed`` names those that are stored as inputs by
    outputs, for methods that ask (GPT-2's are known). ``keys`` tell the models apart for methods that make random
    choices: the same key, the same choices; by default the positions. ``allow_nonfinite`` lets NaN and infinities in,
    which spread over the merge.

    Raises :class:`~merging.errors.InputError` for names or shapes that differ, for values that are not finite, or that
    are not once they are cast, :class:`~merging.errors.FormatError` for parts of adapters, whose changes
    :func:`merge_deltas` merges, and :class:`~merging.errors.OptionError` for a method that needs the base.
    """
    models = list(models)
    bound = _method(method, parameters, len(models))
    if base is None and (bound.merge_space == "delta" or bound.rescales):
        raise OptionError(f"{bound.chain} merges changes from a base: give base=")
    reference = models[0] if base is None else base
    _check_names(models, reference)
    refuse_factors("the state dicts", reference, stated=True, remedy="peft_deltas and merge_deltas are for adapters")
    stacks = _stacks(reference, layers, complete=True)
    merged: dict[str, Tensor] = {}
    left = all_matching(exclude, reference)
    floating = {n: value for n, value in reference.items() if value.is_floating_point() and n not in left}
    turned = all_matching(transposed, floating) | inputs_by_outputs({n: tuple(v.shape) for n, v in floating.items()})
    sites = {name: site_of(name, tuple(value.shape), stacks, name in turned) for name, value in floating.items()}
    weights = bound.merge_space == "weights"
    if not allow_nonfinite:
        named = {f"model {number}": model for number, model in enumerate(models, 1)} | (
            {"the base": base} if base else {}
        )
        for label, model in named.items():
            _check_finite(label, {name: (model[name],) for name in floating})

    def stack(name: str) -> tuple[Stack, Tensor | None]:
        dtype = torch.float64 if floating[name].dtype == torch.float64 else torch.float32
        origin = None if base is None else base[name].to(dtype)
        values = [model[name].to(dtype) for model in models]
        changes = values if weights or origin is None else [value - origin for value in values]
        return Stack([Dense(value) for value in changes], keys), origin

    changes = _merged(bound, sites, stack, weights)
    results = {name: (delta.dense(), origin) for name, delta, origin in changes}
    for name, value in reference.items():
        if name not in results:
            merged[name] = value
            continue
        result, origin = results[name]
        merged[name] = (result if origin is None else origin + result).to(value.dtype)
        if not allow_nonfinite and not _finite(merged[name]):
            raise InputError(
                f"{name}: the merged values are beyond the range of {value.dtype}: give the models in a wider type, or "
                f"use allow_nonfinite=True"
            )
    return merged


def merge_deltas(
    adapters: Sequence[Mapping[str, Delta]],
    *,
    method: str | Method,
    layers: int | None = None,
    exclude: Sequence[str] = (),
    transposed: Sequence[str] = (),
    keys: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    **parameters: Any,
) -> dict[str, Delta]:
    """Merge adapters given as changes by target (``LowRank`` or ``Dense``, as :func:`peft_deltas` makes them).

    A target that an adapter lacks is unchanged by it. Factored methods give ``LowRank`` for ``LowRank``. ``layers`` is
    the number of blocks, by default the largest index among the targets; ``exclude`` (what it names
    is left out), ``transposed`` (of full changes), ``keys`` and ``allow_nonfinite`` are those of
    :func:`merge_state_dicts`. Raises :class:`~merging.errors.InputError` for values that are not finite, and
    :class:`~merging.errors.OptionError` for a method that merges weights, which changes alone do not tell.
    """
    adapters = list(adapters)
    bound = _method(method, parameters, len(adapters))
    if bound.merge_space == "weights" and not bound.factored:
        raise OptionError(f"{bound.chain} merges weights, and these are changes: add them to the base first")
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    for name in all_matching(exclude, names):
        del names[name]
    for number, adapter in enumerate(adapters if not allow_nonfinite else (), 1):
        _check_finite(f"adapter {number}", {name: _parts(adapter[name]) for name in names if name in adapter})
    shapes = {name: _shape(name, adapters) for name in names}
    stacks = _stacks(shapes, layers, complete=False)
    turned = all_matching(transposed, names)
    turned |= {name for adapter in adapters for name, delta in adapter.items() if getattr(delta, "transposed", False)}
    sites = {name: site_of(name, shape, stacks, name in turned) for name, shape in shapes.items()}

    def stack(name: str) -> tuple[Stack, Tensor | None]:
        found = [adapter.get(name) for adapter in adapters]
        like = next(delta for delta in found if delta is not None)
        zero = LowRank.zero(like) if isinstance(like, LowRank) else Dense(torch.zeros_like(like.dense()))
        deltas = [zero if delta is None else delta for delta in found]
        if not all(isinstance(delta, LowRank) for delta in deltas):
            deltas = [Dense(delta.dense()) for delta in deltas]
        return Stack(deltas, keys, present=[delta is not None for delta in found]), None

    return {name: delta for name, delta, _ in _merged(bound, sites, stack, weights=False)}


def _merged(
    method: Method,
    sites: Mapping[str, Site],
    stack_at: Callable[[str], tuple[Stack, Tensor | None]],
    weights: bool,
) -> Iterator[tuple[str, Delta, Tensor | None]]:
    """The merged change of every tensor with the base it belongs on, or the merged weight with no base."""
    models = len(stack_at(next(iter(sites)))[0]) if sites else 0
    check_places(method, sites.values(), models)
    statistics: dict[str, Tensor] = {}

    def opened(name: str) -> tuple[Stack, Unwrapped, Tensor | None]:
        stack, origin = stack_at(name)
        return stack, unwrap_outer(method.at(sites[name]), stack, sites[name], statistics), origin

    for each in method.required_statistics():
        if each.per == "model":
            values = {}
            for name in sites:
                with decomposing(name):
                    _, unwrapped, _ = opened(name)
                    local = _local(unwrapped, statistics, each.name)
                    bound = next(round for round in unwrapped.then.required_statistics() if round.name == each.name)
                    values[name] = bound.measure(unwrapped.stack, unwrapped.site, local)
            statistics[each.name] = _gather(each.reduction, values)

    def merge(name: str) -> tuple[Delta, Stack, Tensor | None]:
        with decomposing(name):
            stack, unwrapped, origin = opened(name)
            merged = unwrapped.rewrap(
                unwrapped.then.merge(unwrapped.stack, unwrapped.site, _local(unwrapped, statistics))
            )
        if weights and not method.rescales:
            return merged, stack, None
        if weights and origin is not None:
            merged, stack = Dense(merged.dense() - origin), stack.map(lambda delta: Dense(delta.dense() - origin))
        return merged, stack, origin

    result_statistics = method.result_statistics(models)
    raw = {name: merge(name) for name in sites} if result_statistics else {}
    for position, statistic in enumerate(result_statistics):
        values = {
            n: method.at(site).result_statistics(models)[position].measure(*raw[n][:2], site)
            for n, site in sites.items()
        }
        statistics[statistic.name] = _gather(statistic.reduction, values)
    for name, site in sites.items():
        merged, _, origin = raw[name] if result_statistics else merge(name)
        yield name, merged.scaled(method.at(site).factor(site, statistics, models)), origin


def _local(unwrapped: Unwrapped, statistics: Statistics, before: str | None = None) -> Statistics:
    """The results of all rounds, or of those before one, those over this tensor among them."""
    local = dict(statistics)
    for each in unwrapped.then.required_statistics():
        if each.name == before:
            break
        if each.per == "tensor":
            local[each.name] = _gather(
                each.reduction, {unwrapped.site.name: each.measure(unwrapped.stack, unwrapped.site, local)}
            )
    return local


def _gather(reduction: Reduction, values: Mapping[str, Tensor]) -> Tensor:
    wide = any(value.dtype == torch.float64 for value in values.values())
    state = reduction.widened(torch.float64 if wide else torch.float32).start()
    while True:
        for name, each in values.items():
            feed(state, each, name)
        if not state.next():
            return state.result()


def _method(method: str | Method, parameters: Mapping[str, Any], models: int) -> Method:
    if not models:
        raise InputError("there is nothing to merge: give at least one model")
    if isinstance(method, Method):
        if parameters:
            raise OptionError(f"{next(iter(parameters))!r} is no option here: give it to the method itself")
        bound = method
    else:
        bound = chain(method, parameters)
    bound.check(models)
    return bound


def _check_names(models: Sequence[Mapping[str, Tensor]], reference: Mapping[str, Tensor]) -> None:
    for number, model in enumerate(models, 1):
        odd = sorted(model.keys() ^ reference.keys())
        if odd:
            raise InputError(f"model {number} {'has' if odd[0] in model else 'lacks'} {odd[0]}, unlike the others")
        for name, value in reference.items():
            if model[name].shape != value.shape:
                raise InputError(
                    f"{name} of model {number} is {tuple(model[name].shape)} instead of {tuple(value.shape)}"
                )


def _check_finite(label: str, tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse tensors, each in its parts, that hold NaN or infinities."""
    for name, parts in tensors.items():
        if not all(map(_finite, parts)):
            raise InputError(
                f"{label}: {name} holds NaN or infinite values, which would spread over the merge: repair or leave out "
                f"this model, or use allow_nonfinite=True"
            )


def _finite(values: Tensor) -> bool:
    values = values.detach().float() if values.element_size() == 1 else values.detach()
    # One sum tells of most tensors that they are finite; only a sum that is not is looked into.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def _parts(delta: Delta) -> Sequence[Tensor]:
    return (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.dense(),)


def _shape(name: str, adapters: Sequence[Mapping[str, Delta]]) -> tuple[int, ...]:
    shapes = {adapter[name].shape for adapter in adapters if name in adapter}
    if len(shapes) > 1:
        raise InputError(f"{name} has different shapes: {', '.join(map(str, sorted(shapes)))}")
    return shapes.pop()


def _stacks(names: Mapping[str, object], layers: int | None, complete: bool) -> Stacks:
    stacks = Stacks.from_names(names, complete=complete)
    return stacks.with_layers(layers) if layers else stacks


def peft_deltas(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Delta]:
    """The changes of a PEFT LoRA state dict (``get_peft_model_state_dict``) by target, every scale folded in.

    Factors stay on their device and keep their gradients. Raises :class:`~merging.errors.FormatError` for what is no
    plain LoRA, and :class:`~merging.errors.InputError` for variants that need the base (DoRA, PiSSA, OLoRA).
    """
    stored = {name: MappedTensor(tensor, ("", 0)) for name, tensor in state_dict.items()}
    deltas: dict[str, Delta] = {}
    for target, change in peft_changes(stored, config, "the state dict").items():
        if change.needs_base or not isinstance(change, LoraChange):
            raise InputError(
                f"{target}: {change.needs_base or 'is no LoRA'}: merge this adapter from its files, with its base"
            )
        down, up = (part.tensor for part in (change.down, change.up) if isinstance(part, MappedTensor))
        rank = len(down)
        deltas[target] = LowRank(
            up.reshape(-1, rank) * change.scale, down.reshape(rank, -1), change.shape, change.transposed
        )
    return deltas


def peft_state_dict(deltas: Mapping[str, Delta]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Changes as PEFT keeps them: a state dict for ``set_peft_model_state_dict``, and the config it goes with.

    One rank for all, reached by zeros, and alpha equal to it. Targets are linear weights. Raises
    :class:`~merging.errors.InputError` for changes that are not low-rank matrices.
    """
    low = {target: delta for target, delta in deltas.items() if isinstance(delta, LowRank) and len(delta.shape) == 2}
    if len(low) < len(deltas) or not low:
        odd = next((target for target in deltas if target not in low), "nothing")
        raise InputError(f"{odd}: PEFT's linear LoRA holds only low-rank changes of matrices")
    rank = max(delta.rank for delta in low.values())
    state: dict[str, Tensor] = {}
    for target, delta in low.items():
        module = "base_model.model." + target.removesuffix(".weight")
        missing = rank - delta.rank
        state[f"{module}.lora_A.weight"] = torch.nn.functional.pad(delta.down, (0, 0, 0, missing))
        state[f"{module}.lora_B.weight"] = torch.nn.functional.pad(delta.up, (0, missing))
    modules = (target.removesuffix(".weight") for target in low)
    transposed = any(delta.transposed for delta in low.values())
    return state, lora_config(rank=rank, target_modules=modules, fan_in_fan_out=transposed)
