"""Values of parameters in mergekit's form: lists of points over the layers, and lists of filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from merging.errors import OptionError
from merging.maths.parameters import ByName, Gradient, plain
from merging.maths.patterns import has_wildcards
from merging.plan.mergekit.values import EVERYWHERE

__all__ = ["spread_value", "write_value"]


def spread_value(value: Any, count: int) -> list[Any]:
    """Return the value of a parameter for each model. Raises :class:`~merging.errors.OptionError` for another count."""
    if isinstance(value, tuple):
        if len(value) != count:
            raise OptionError(f"{plain(value)} has {len(value)} values for {count} models")
        return list(value)
    if isinstance(value, ByName):
        spread = [(pattern, spread_value(rule, count)) for pattern, rule in value.rules]
        return [ByName(rules=tuple((pattern, rules[index]) for pattern, rules in spread)) for index in range(count)]
    return [plain(value)] * count if not isinstance(value, Gradient) else [value] * count


def write_value(value: Any, invert: Callable[[Any], Any] | None = None) -> Any:
    """Return a value in mergekit's form; ``invert`` turns each number into mergekit's.

    Raises :class:`~merging.errors.OptionError` for a value that mergekit cannot say.
    """
    if isinstance(value, ByName):
        return [_write_rule(pattern, rule, invert) for pattern, rule in value.rules]
    if isinstance(value, Gradient):
        first, last = value.points[0], value.points[-1]
        if first != (last if value.outside is None else value.outside):
            raise OptionError(
                f"{value.plain()}: before and after the blocks a gradient of mergekit has its first value: write "
                f'"{":".join(map(str, value.points))} else {first}"'
            )
        return [_invert(point, invert) for point in value.points]
    return _invert(plain(value), invert)


def _write_rule(pattern: str, rule: Any, invert: Callable[[Any], Any] | None) -> dict[str, Any]:
    if pattern == EVERYWHERE:
        return {"value": write_value(rule, invert)}
    if has_wildcards(pattern):
        raise OptionError(f"{pattern}: a filter of mergekit is a part of a name, without wildcards")
    return {"filter": pattern, "value": write_value(rule, invert)}


def _invert(value: Any, invert: Callable[[Any], Any] | None) -> Any:
    inverted = invert(value) if invert else value
    if inverted is None:
        raise OptionError(f"mergekit has no value like {value!r}")
    return inverted
