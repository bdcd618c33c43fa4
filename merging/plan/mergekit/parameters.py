"""Parameters at all levels of a recipe of mergekit: source over slice over module over the whole recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from merging.errors import nearest
from merging.plan.mergekit.methods import MethodSpec, Parameter
from merging.plan.mergekit.reading import Reading
from merging.plan.mergekit.schema import top
from merging.plan.mergekit.values import (
    FilterRule,
    Scalar,
    convert_points,
    join_rules,
    origins_of,
    read_rules,
    renumber,
    state,
)
from merging.plan.recipe_document import Keys

__all__ = ["Levels", "Stated", "check_names", "read_parameters"]


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a slice.

    Attributes:
        count: their number.
        start: the number of the first one in the output.
    """

    count: int
    start: int


@dataclass(frozen=True, slots=True)
class Levels:
    """The places of ``parameters`` that count for a merge, the nearest first.

    Attributes:
        models: the place of each model's own parameters.
        shared: the places of parameters for all models.
        layers: the layers of a slice, None for whole models.
        starts: the number of the first layer of the slice in each model.
    """

    models: Sequence[Keys]
    shared: Sequence[Keys]
    layers: Layers | None = None
    starts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Stated:
    """A parameter in our schema.

    Attributes:
        value: the value.
        keys: the way to the value in the document; None for a default.
        patterns: the ways to the values of patterns in the document, by the keys of the patterns in ``value``.
    """

    value: Any
    keys: Keys | None
    patterns: Mapping[Keys, Keys] = field(default_factory=dict)


def check_names(reading: Reading, spec: MethodSpec, keys: Keys, *, of_model: bool) -> None:
    """Refuse parameters that the method does not have, or has for all models only.

    Raises :class:`~merging.errors.OptionError`.
    """
    for name in reading.mapping(keys, "parameters"):
        parameter = spec.parameters.get(name)
        if parameter is None:
            known = list(spec.parameters)
            hint = nearest(name, known)
            if not hint and not top().get(name, "unknown"):
                hint = ": it is a key of the recipe itself, not a parameter"
            if not hint:
                hint = f": its parameters are {', '.join(known)}" if known else ", nor any other"
            reading.ignore((*keys, name), f"{spec.name} has no parameter {name!r}{hint}")
        elif of_model and not parameter.per_model:
            reading.ignore(
                (*keys, name), f"{name} of {spec.name} is one for all models: write it under parameters of the recipe"
            )


def read_parameters(reading: Reading, spec: MethodSpec, levels: Levels) -> dict[str, Stated]:
    """Return the parameters of a merge in our schema, by our names.

    Raises :class:`~merging.errors.OptionError` for values that the method does not take, and for a parameter that it
    needs and that a model lacks.
    """
    stated: dict[str, Stated] = {}
    for name, parameter in spec.parameters.items():
        places = levels.models if parameter.per_model else [()]
        rules = [_resolve(reading, name, parameter, own, levels.shared) for own in places]
        if layers := levels.layers:  # names of mergekit's filters: of inputs for values of models, else of the output
            starts = levels.starts if parameter.per_model else (layers.start,)
            rules = [renumber(each, start, layers.count) for each, start in zip(rules, starts, strict=True)]
        for own, each in zip(places, rules, strict=True):
            if parameter.required and not each:
                raise _missing(reading, name, spec, own)
        for rule in (rule for each in rules for rule in each):
            if len(set(rule.points)) > 1 and any(_is_word(point) for point in rule.points):
                raise reading.error(rule.keys, f"{name} does not differ from layer to layer: write one value")
        given = next((rule.keys for each in rules for rule in each if rule.keys), None)
        if parameter.idle and given:
            reading.note(given, f"{name} has no effect with {spec.name}: {parameter.idle}")
        if parameter.target and any(rules):
            values = [state(each, one_layer=layers is not None and layers.count == 1) for each in rules]
            if all(value == values[0] for value in values):
                patterns = origins_of(rules[0])
                stated[parameter.target] = Stated(values[0], given, patterns)
                continue
            patterns = {(index, *keys): at for index, each in enumerate(rules) for keys, at in origins_of(each).items()}
            stated[parameter.target] = Stated(values, given, patterns)
    if spec.name == "nuslerp":
        stated["axis"] = _axis(reading, stated.pop("flatten"), stated.pop("row_wise"))
    return stated


def _is_word(point: Scalar) -> bool:
    """Return whether a value is a word, and neither a number nor a switch, so that no points can be made of it."""
    try:
        return isinstance(point, str) and not isfinite(float(point))
    except ValueError:
        return True


def _axis(reading: Reading, flatten: Stated, row_wise: Stated) -> Stated:
    """Return our axis of nuslerp. mergekit's ``row_wise`` goes down the columns."""
    for each in (flatten, row_wise):
        if not isinstance(each.value, bool):
            raise reading.error(each.keys or (), "nuslerp takes one axis for the whole merge: write true or false")
    axis = "flat" if flatten.value else "columns" if row_wise.value else "rows"
    return Stated(axis, row_wise.keys or flatten.keys)


def _resolve(reading: Reading, name: str, parameter: Parameter, own: Keys, shared: Sequence[Keys]) -> list[FilterRule]:
    """Return the rules of a parameter for one model, or for all of them where ``own`` is empty."""
    levels = [
        read_rules(reading, (*keys, name), parameter.bounds)
        for keys in ((own, *shared) if own else shared)
        if name in reading.mapping(keys, "parameters")
    ]
    rules = join_rules(levels)
    if rules and parameter.convert:
        rules = convert_points(rules, parameter.convert)
    if parameter.default is None or not (rules or parameter.target):
        return rules
    default = parameter.convert(parameter.default) if parameter.convert else parameter.default
    return join_rules([rules, [FilterRule("*", (default,), ())]])


def _missing(reading: Reading, name: str, spec: MethodSpec, own: Keys) -> Exception:
    if own:
        return reading.error(own, f"{spec.name} needs a {name} for each model: write parameters: {{{name}: 1.0}}")
    return reading.error(("merge_method",), f"{spec.name} needs {name}: write it under parameters of the recipe")
