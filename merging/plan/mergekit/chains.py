"""The method of a recipe of mergekit: one of its own, or a chain of ours, with our parameters in both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

from merging.errors import MergingError, nearest
from merging.maths.parameters import plain
from merging.methods import chain, links, parameters_of
from merging.methods.contract.method import Method
from merging.plan.mergekit.methods import METHODS, MethodSpec, Parameter
from merging.plan.mergekit.reading import Reading
from merging.plan.mergekit.values import Bounds

__all__ = ["defaults_of", "find_method"]

_THEIRS = {"weights": ("weight",), "scale": ("scale", "lambda")}
"""Our parameters that go by mergekit's names in a chain of ours."""


def find_method(reading: Reading, name: str) -> MethodSpec:
    """Return mergekit's method of a name, or else a chain of ours, with our defaults.

    Parameters of ours that mergekit does not have are parameters of both. Raises
    :class:`~merging.errors.OptionError` for an unknown name.
    """
    keys = ("merge_method",)
    if name not in METHODS:
        if hint := nearest(name, METHODS):
            raise reading.error(keys, f"there is no method {name!r}{hint}")
        try:
            links(name)
        except MergingError as error:
            raise reading.error(keys, str(error)) from None
    spec = METHODS.get(name) or _our_chain(name)
    return replace(spec, name=name, parameters={**spec.parameters, **_our_parameters(spec, own=name not in METHODS)})


def _our_chain(name: str) -> MethodSpec:
    method = chain(name)
    least, most = max(1, method.models[0]), method.models[1]
    base: Literal["required", "ignored"] = "required" if method.merge_space == "delta" else "ignored"
    return MethodSpec(name, base=base, models=(least, most))


def _our_parameters(spec: MethodSpec, *, own: bool) -> dict[str, Parameter]:
    """Return the parameters of a chain that mergekit does not set, by their own names and by link and field.

    A weight that mergekit's method of this name would ignore is not among them, but by link and field.
    """
    used = {parameter.target for parameter in spec.parameters.values()}
    found: dict[str, Parameter] = {}
    classes = links(spec.chain)
    every = [field for cls in classes for field in parameters_of(cls)]
    for cls in classes:
        for field in parameters_of(cls):
            target = f"{cls.name}.{field}"
            if target in used or (field in used and len(classes) == 1):
                continue
            names = [target]
            if every.count(field) == 1 and (own or field != "weights"):
                names += _THEIRS.get(field, (field,)) if own else (field,)
            parameter = Parameter(Bounds("any"), per_model=_is_per_model(cls, field), target=target)
            found.update({name: parameter for name in names if name not in spec.parameters})
    return found


def _is_per_model(cls: type[Method], field: str) -> bool:
    """Return whether a parameter can have a value for each model."""
    return any(get_origin(each) is tuple for each in get_args(cls.model_fields[field].annotation))


def defaults_of(text: str) -> dict[str, Any]:
    """Return our defaults of a chain's parameters by field, and by link and field."""
    defaults: dict[str, Any] = {}
    for link in reversed(chain(text).links()):
        for field in parameters_of(type(link)):
            defaults[field] = defaults[f"{link.name}.{field}"] = plain(getattr(link, field))
    return defaults
