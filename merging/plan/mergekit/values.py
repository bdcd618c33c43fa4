"""Values of parameters as mergekit writes them: one, a list of points over the layers, or a list of filters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, TypeAlias

from merging.maths.parameters import Gradient
from merging.maths.patterns import has_wildcards
from merging.plan.mergekit.reading import Reading
from merging.plan.mergekit.schema import CONDITION
from merging.plan.recipe_document import Keys

__all__ = [
    "EVERYWHERE",
    "Bounds",
    "FilterRule",
    "Scalar",
    "convert_points",
    "join_rules",
    "origins_of",
    "read_rules",
    "renumber",
    "state",
]

Scalar: TypeAlias = float | bool | str

EVERYWHERE = "*"
"""The pattern of all tensors."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values that a parameter takes: a kind, and for numbers the least and the most."""

    kind: Literal["number", "whole", "switch", "any"] = "number"
    least: float = -1e30
    most: float = 1e30
    below: float | None = None

    def read(self, value: Any) -> Scalar:
        """Return the value in its kind, from the forms in which YAML has it. Raises ValueError with words about it."""
        if self.kind == "any":
            return value  # type: ignore[no-any-return]
        if self.kind == "switch":
            return _read_switch(value)
        number = _read_number(value, self.kind == "whole")
        if number < self.least:
            raise ValueError(f"should be at least {self.least:g}")
        if number > self.most:
            raise ValueError(f"should be at most {self.most:g}")
        if self.below is not None and number >= self.below:
            raise ValueError(f"should be less than {self.below:g}")
        return number


def _read_switch(value: Any) -> bool:
    text = str(value).lower() if isinstance(value, (str, int, float)) else ""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if text not in known:
        raise ValueError("should be true or false")
    return known[text]


def _read_number(value: Any, whole: bool) -> float:
    words = "should be a whole number" if whole else "should be a number"
    try:
        number = float(value) if isinstance(value, (str, int, float)) else float("nan")
    except (ValueError, OverflowError):
        raise ValueError(words) from None
    if not isfinite(number) or (whole and number != int(number)):
        raise ValueError(words)
    return int(number) if whole else number


@dataclass(frozen=True, slots=True)
class FilterRule:
    """A value at the tensors that a pattern means: one, or points over the layers; ``keys`` lead to it."""

    pattern: str
    points: tuple[Scalar, ...]
    keys: Keys


def read_rules(reading: Reading, keys: Keys, bounds: Bounds) -> list[FilterRule]:
    """Return the rules that a value of a parameter stands for, checked.

    Raises :class:`~merging.errors.OptionError` for values of other forms and out of bounds, and for filters without
    effect.
    """
    value = reading.value(keys)
    conditions = [value] if isinstance(value, dict) else value
    if not (isinstance(conditions, list) and any(isinstance(each, dict) for each in conditions)):
        points = _read_points(reading, keys, value, bounds)
        return [FilterRule(EVERYWHERE, points, keys)] if points else []
    rules: list[FilterRule] = []
    for index, condition in enumerate(conditions):
        at = keys if isinstance(value, dict) else (*keys, index)
        if not isinstance(condition, dict):
            raise reading.error(at, f"{keys[-1]} mixes filters and values: give each value a filter, or none")
        rule = _read_condition(reading, at, bounds)
        if rule is None:
            continue
        if covered := next((each for each in rules if _covers(each, rule)), None):
            first = "a value without a filter" if covered.pattern == EVERYWHERE else f"the filter {covered.pattern!r}"
            reading.ignore(
                at,
                f"{keys[-1]}: {_name(rule)} takes effect nowhere, since {first} comes before it and the first that "
                f"matches counts: put it first",
            )
            continue
        rules.append(rule)
    return rules


def _name(rule: FilterRule) -> str:
    return "the value without a filter" if rule.pattern == EVERYWHERE else f"the filter {rule.pattern!r}"


def _read_condition(reading: Reading, keys: Keys, bounds: Bounds) -> FilterRule | None:
    """Return the rule of a filter and its value, None for one that mergekit ignores in a lenient reading."""
    values = reading.check_keys(keys, "a filter", CONDITION)
    if values.get("value") is None:
        raise reading.error(keys, "a filter needs a value: write - {filter: NAME, value: NUMBER}")
    pattern = values.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise reading.error((*keys, "filter"), f"filter should be a part of tensors' names, and is {pattern!r:.80}")
    points = _read_points(reading, (*keys, "value"), values["value"], bounds)
    pattern = pattern or EVERYWHERE
    if pattern != EVERYWHERE and has_wildcards(pattern):
        bare = pattern.strip("*")
        hint = f": write {bare!r}" if bare and not has_wildcards(bare) else ""
        reading.ignore(
            (*keys, "filter"), f"filter {pattern!r} matches nothing: a filter is a part of a name, no wildcard{hint}"
        )
        return None
    return FilterRule(pattern, points, keys) if points else None


def _read_points(reading: Reading, keys: Keys, value: Any, bounds: Bounds) -> tuple[Scalar, ...]:
    points = value if isinstance(value, list) else [value]
    name = next((str(key) for key in reversed(keys) if isinstance(key, str) and key != "value"), "value")
    read = []
    for index, point in enumerate(points):
        at = (*keys, index) if isinstance(value, list) else keys
        if isinstance(point, (list, dict)) or point is None:
            raise reading.error(at, f"{name} should be a value, a list of values or a list of filters: {point!r:.80}")
        try:
            read.append(bounds.read(point))
        except ValueError as error:
            raise reading.error(at, f"{name} = {point!r:.80}: {error}") from None
    return tuple(read)


def _covers(first: FilterRule, later: FilterRule) -> bool:
    """Return whether every name that the later rule means is meant by the first one already."""
    return first.pattern == EVERYWHERE or (later.pattern != EVERYWHERE and first.pattern in later.pattern)


def join_rules(levels: Sequence[Sequence[FilterRule]]) -> list[FilterRule]:
    """Return the rules of several levels as one list, the nearest level first, without rules that are never reached."""
    joined: list[FilterRule] = []
    for rule in (rule for level in levels for rule in level):
        if not any(_covers(each, rule) for each in joined):
            joined.append(rule)
    return joined


def convert_points(rules: Sequence[FilterRule], convert: Callable[[Any], Any]) -> list[FilterRule]:
    """Return the rules with each of their points converted."""
    return [FilterRule(rule.pattern, tuple(map(convert, rule.points)), rule.keys) for rule in rules]


def state(rules: Sequence[FilterRule], *, one_layer: bool = False) -> Any:
    """Return rules in our schema: a value, a gradient as text, or a mapping of patterns to these.

    Before and after the layers a gradient has its first point, and in one layer alone its last, as in mergekit.
    """
    if one_layer:
        rules = [FilterRule(rule.pattern, rule.points[-1:], rule.keys) for rule in rules]
    if not rules:
        return None
    stated = {rule.pattern: _state_points(rule.points) for rule in rules}
    return stated[EVERYWHERE] if len(stated) == 1 and EVERYWHERE in stated else stated


_NUMBERED = re.compile(r"(.*\b(?:layers?|blocks?|h)\.)([0-9]+)(.*)")
"""A filter that names a layer: the part before its number, the number, and the rest."""


def renumber(rules: Sequence[FilterRule], start: int, count: int) -> list[FilterRule]:
    """Return rules of a slice for its layers counted from 0, whose first one is number ``start`` in the filters.

    A filter ``layers.1`` is a part of the names of layers 1 and 10 to 19.
    """
    renumbered = []
    for rule in rules:
        found = _NUMBERED.fullmatch(rule.pattern)
        if found is None:
            renumbered.append(rule)
            continue
        before, number, rest = found.groups()
        layers = [str(start + index) for index in range(count)]
        renumbered += [
            FilterRule(f"{before}{index}{rest or '.'}", rule.points, rule.keys)
            for index, layer in enumerate(layers)
            if layer == number or (not rest and layer.startswith(number))
        ]
    return renumbered


def origins_of(rules: Sequence[FilterRule]) -> dict[Keys, Keys]:
    """Return the way to each pattern's value in the document, by the keys of the pattern; a default has none."""
    return {(rule.pattern,): rule.keys for rule in rules if rule.keys and rule.pattern != EVERYWHERE}


def _state_points(points: tuple[Any, ...]) -> Any:
    if all(point == points[0] for point in points):
        return points[0]
    return Gradient(points=points, outside=points[0]).plain()
