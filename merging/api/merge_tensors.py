"""Merging tensors that are in memory, on any device: no file is touched, and gradients go through."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from typing_extensions import Unpack

from merging.api.arguments import (
    check_deltas,
    check_keys,
    check_layers,
    check_method,
    check_state_dict,
    check_state_dicts,
)
from merging.api.options import MethodParameters
from merging.engine.devices import supply_operations
from merging.engine.in_memory import TensorInputs, merge_in_memory
from merging.errors import InputError, OptionError, option
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.layers import Stacks
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.patterns import all_matching
from merging.maths.site import inputs_by_outputs, site_of
from merging.methods import chain
from merging.methods.blocks import interpolate
from merging.methods.contract.method import Method
from merging.sources.loose_factors import refuse_factors
from merging.type_checks import check_types

__all__ = ["make_method", "merge_changes", "merge_deltas", "merge_state_dicts"]


@check_types("models", "method", "base", "keys")
def merge_state_dicts(
    models: Sequence[Mapping[str, Tensor]],
    *,
    method: str | Method,
    base: Mapping[str, Tensor] | None = None,
    layers: int | None = None,
    exclude: str | Sequence[str] = (),
    transposed: str | Sequence[str] = (),
    keys: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    **parameters: Unpack[MethodParameters],
) -> dict[str, Tensor]:
    """Merge full models given as state dicts.

    The models have the same names and shapes, on the same devices, and so has the result. Merging is computed in
    float32, or in float64 for float64 tensors.

    Args:
        models: the state dicts, in the order of their weights.
        method: a method, or a chain as it is written (``"lines+task_arithmetic"``).
        base: the state dict that the models were trained from, for methods that merge changes.
        layers: the number of blocks where the names do not show it.
        exclude: names, parts of names or wildcards of tensors that stay the base's.
        transposed: names, parts of names or wildcards of matrices stored as ``[in, out]``, for methods that depend on
            it. GPT-2's are known.
        keys: one key a model for methods that draw random numbers: the same key, the same draws. The positions by
            default.
        allow_nonfinite: whether NaN and infinities are merged, which spread over the result.
        **parameters: the method's parameters by name. Coefficients may be tensors, and gradients reach them.

    Returns:
        The merged state dict, in the types of ``base``, or of the first model. Tensors of other than floating-point
        numbers are the base's.

    Raises:
        InputError: for names or shapes that differ, and for values that are not finite, before or after the cast.
        FormatError: for parts of adapters, whose changes :func:`merge_deltas` merges.
        OptionError: for a method that needs a base where there is none.

    Example:
        >>> import torch, merging
        >>> models = [{"w": torch.zeros(2)}, {"w": torch.ones(2)}]
        >>> merging.merge_state_dicts(models, method="linear", weights=[1, 3])
        {'w': tensor([0.7500, 0.7500])}
    """
    models = check_state_dicts(models)
    base = None if base is None else check_state_dict(base, "base")
    bound = make_method(method, parameters, len(models))
    check_keys(keys, len(models))
    if base is None:
        bound = interpolate(bound, len(models))
    if base is None and (bound.merge_space == "delta" or bound.rescales):
        raise OptionError(f"{bound.chain} merges changes from a base: give base=")
    reference = models[0] if base is None else base
    _check_names(models, reference)
    refuse_factors("the state dicts", reference, stated=True, remedy="peft_deltas and merge_deltas are for adapters")
    stacks = _find_stacks(reference, layers, complete=True)
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

    def read(name: str) -> TensorInputs:
        dtype = torch.float64 if floating[name].dtype == torch.float64 else torch.float32
        origin = None if base is None else base[name].to(dtype)
        values = [model[name].to(dtype) for model in models]
        changes = values if weights or origin is None else [value - origin for value in values]
        return TensorInputs(Stack([Dense(value) for value in changes], keys), origin)

    with supply_operations(next((each.device for each in floating.values()), torch.device("cpu"))):
        results = {
            name: (delta.dense(), origin) for name, delta, origin in merge_in_memory(bound, sites, read, weights)
        }
        for name, value in reference.items():
            if name not in results:
                merged[name] = value
                continue
            result, origin = results[name]
            merged[name] = (result if origin is None else origin + result).to(value)
            if not allow_nonfinite and not _is_finite(merged[name]):
                raise InputError(
                    f"{name}: the merged values are beyond the range of {value.dtype}: give the models in a wider "
                    f"type, or use allow_nonfinite=True"
                )
    return merged


@check_types("adapters", "method", "keys")
def merge_deltas(
    adapters: Sequence[Mapping[str, Delta]],
    *,
    method: str | Method,
    layers: int | None = None,
    exclude: str | Sequence[str] = (),
    transposed: str | Sequence[str] = (),
    keys: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    **parameters: Unpack[MethodParameters],
) -> dict[str, Delta]:
    """Merge adapters given as changes by target.

    Args:
        adapters: one mapping an adapter, from target to :class:`~merging.maths.delta.LowRank` or
            :class:`~merging.maths.delta.Dense`, from :func:`~merging.peft_deltas`. An adapter does not change a target
            that it lacks.
        method: a method, or a chain as it is written.
        layers: the number of blocks; by default the largest index among the targets.
        exclude: names, parts of names or wildcards of targets that are left out.
        transposed: names, parts of names or wildcards of full changes stored as ``[in, out]``.
        keys: one key an adapter for methods that draw random numbers; the positions by default.
        allow_nonfinite: whether NaN and infinities are merged, which spread over the result.
        **parameters: the method's parameters by name. Coefficients may be tensors, and gradients reach them.

    Returns:
        The merged change of every target. Factored methods return ``LowRank`` for ``LowRank``.

    Raises:
        InputError: for shapes that differ, and for values that are not finite.
        OptionError: for a method that merges weights, which changes alone do not give.

    Example:
        >>> import torch, merging
        >>> one = {"w": merging.LowRank(torch.ones(2, 1), torch.ones(1, 3), (2, 3))}
        >>> merging.merge_deltas([one, one], method="task_arithmetic")["w"].rank
        2
    """
    adapters = check_deltas(adapters)
    bound = make_method(method, parameters, len(adapters))
    return merge_changes(
        adapters,
        bound,
        layers=layers,
        exclude=exclude,
        transposed=transposed,
        keys=keys,
        allow_nonfinite=allow_nonfinite,
    )


def merge_changes(
    adapters: Sequence[Mapping[str, Delta]],
    bound: Method,
    *,
    of_model: Iterable[str] = (),
    layers: int | None = None,
    exclude: str | Sequence[str] = (),
    transposed: str | Sequence[str] = (),
    keys: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, Delta]:
    """Merge adapters as :func:`merge_deltas` does; ``of_model`` are the model's tensors, which show its blocks."""
    if bound.merge_space == "weights" and not bound.factored:
        spaces = any("space" in type(link).model_fields for link in bound.links())
        instead = f"use {option('space', 'changes')}, or " if spaces else ""
        raise OptionError(
            f"{bound.chain} merges weights, and these are changes: {instead}merge the adapters' files, with "
            f"{option('base')}"
        )
    if bound.needs_base:
        raise OptionError(
            f"{bound.chain} looks at the base's weights, and these are changes: merge the adapters' files, with "
            f"{option('base')}"
        )
    check_keys(keys, len(adapters))
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    for name in all_matching(exclude, names):
        del names[name]
    for number, adapter in enumerate(adapters if not allow_nonfinite else (), 1):
        _check_finite(f"adapter {number}", {name: _parts(adapter[name]) for name in names if name in adapter})
    shapes = {name: _shape(name, adapters) for name in names}
    tensors = list(of_model)
    stacks = _find_stacks(tensors or shapes, layers, complete=bool(tensors))
    turned = all_matching(transposed, names)
    turned |= {name for adapter in adapters for name, delta in adapter.items() if getattr(delta, "transposed", False)}
    sites = {name: site_of(name, shape, stacks, name in turned) for name, shape in shapes.items()}

    def read(name: str) -> TensorInputs:
        found = [adapter.get(name) for adapter in adapters]
        like = next(delta for delta in found if delta is not None)
        zero = LowRank.zero(like) if isinstance(like, LowRank) else Dense(torch.zeros_like(like.dense()))
        deltas = [zero if delta is None else delta for delta in found]
        if not all(isinstance(delta, LowRank) for delta in deltas):
            deltas = [Dense(delta.dense()) for delta in deltas]
        return TensorInputs(Stack(deltas, keys, present=[delta is not None for delta in found]), None)

    given = {name: next(_parts(each[name])[0].device for each in adapters if name in each) for name in names}
    with supply_operations(next(iter(given.values()), torch.device("cpu"))):
        return {name: delta.to(given[name]) for name, delta, _ in merge_in_memory(bound, sites, read, weights=False)}


def make_method(method: str | Method, parameters: Mapping[str, object], models: int) -> Method:
    """Return the method with its parameters, checked against the number of models."""
    check_method(method)
    if not models:
        raise InputError("there is nothing to merge: give at least one model")
    if isinstance(method, Method):
        if parameters:
            raise OptionError(f"{next(iter(parameters))!r} is not an option here: give it to the method itself")
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
        if not all(map(_is_finite, parts)):
            raise InputError(
                f"{label}: {name} holds NaN or infinite values, which would spread over the merge: repair or leave out "
                f"this model, or use allow_nonfinite=True"
            )


def _is_finite(values: Tensor) -> bool:
    values = values.detach().float() if values.element_size() == 1 else values.detach()
    # Of most tensors one sum shows that they are finite; only where it is not, each value is looked at.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def _parts(delta: Delta) -> Sequence[Tensor]:
    return (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.dense(),)


def _shape(name: str, adapters: Sequence[Mapping[str, Delta]]) -> tuple[int, ...]:
    shapes = {adapter[name].shape for adapter in adapters if name in adapter}
    if len(shapes) > 1:
        raise InputError(f"{name} has different shapes: {', '.join(map(str, sorted(shapes)))}")
    return shapes.pop()


def _find_stacks(names: Iterable[str], layers: int | None, complete: bool) -> Stacks:
    check_layers(layers)
    stacks = Stacks.from_names(names, complete=complete)
    return stacks if layers is None else stacks.with_layers(layers)
