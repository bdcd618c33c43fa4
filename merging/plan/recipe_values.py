"""Recipes from plain values, as YAML and JSON hold them; errors name the place of the value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from merging.errors import OptionError, nearest
from merging.maths.parameters import plain
from merging.methods import chain, links, parameters_of
from merging.methods.contract.method import Method
from merging.plan.checked_model import describe_invalid
from merging.plan.layer_stack import LayerPart, LayerStack
from merging.plan.recipe import FIELDS, Entry, Recipe
from merging.plan.recipe_document import Keys
from merging.plan.tokens.settings import rename_models, resolve_template

__all__ = ["check_counts", "is_recipe", "make_recipe", "map_names", "names_in", "patterns_in"]

Place: TypeAlias = Callable[[Keys], str]
"""Returns the place of a value (``merge.yml, line 3``) from its keys."""

_PART = tuple(LayerPart.model_fields)

_THEIRS = {
    "merge_method": "method",
    "base_model": "base",
    "slices": "stack",
    "out_dtype": "dtype",
    "tokenizer_source": "tokenizer",
}
"""Keys of mergekit's recipes, and what they are called in ours."""


def make_recipe(values: dict[str, Any], where: str = "recipe", origin: Place | None = None) -> Recipe:
    """Make a recipe from plain values.

    Args:
        values: the fields by name, and ``parameters``; ``stack`` in the place of ``models`` and ``method``.
        where: the source of the values, which errors name.
        origin: a function that returns the place of a value from its keys, for errors; by default it is ``where``.

    Raises:
        OptionError: for fields or values that no recipe has. It names the field and the values it accepts.
    """
    place = origin or (lambda keys: where)
    values = _with_entries(values, place, origin)
    _check_keys(values, place)
    if not isinstance(values.get("method", ""), (str, Method)):
        raise OptionError(f"{place(('method',))}: method should be a name, and is {str(values['method'])[:80]!r}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise describe_invalid(error, place(error.errors()[0]["loc"])) from None
    except OptionError as error:
        if origin is None:
            raise
        raise OptionError(f"{origin(_find_refused(values, str(error)))}: {error}") from None


def is_recipe(value: object) -> bool:
    """Return whether a plain value is a recipe, and not a name or a part of a stack."""
    return isinstance(value, Mapping) and ("models" in value or "method" in value or _is_short(value))


def names_in(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield the names of models in a recipe's plain values, nested ones too, and the way to each."""
    found: list[tuple[Keys, str]] = []

    def note(name: str, at: Keys) -> str:
        if not {"tokenizer", "chat_template"} & set(at):
            found.append((at, name))
        return name

    map_names(value, note, keys)
    yield from found


def map_names(value: Any, function: Callable[[str, Keys], str], keys: Keys = ()) -> Any:
    """Return a recipe's plain values with each name of a model or file replaced by ``function(name, keys)``."""
    if isinstance(value, str):
        return function(value, keys) if keys else value
    if not isinstance(value, Mapping):
        return value
    changed = dict(value)
    for key in ("models", "stack"):
        if isinstance(changed.get(key), (list, tuple)):
            changed[key] = [map_names(each, function, (*keys, key, i)) for i, each in enumerate(changed[key])]
    for key in ("base", "model"):
        if key in changed:
            changed[key] = map_names(changed[key], function, (*keys, key))
    if isinstance(changed.get("stats"), (str, list, tuple)):
        stats = [changed["stats"]] if isinstance(changed["stats"], str) else changed["stats"]
        changed["stats"] = [map_names(each, function, (*keys, "stats", i)) for i, each in enumerate(stats)]
    for key, rename in (("tokenizer", rename_models), ("chat_template", resolve_template)):
        if key in changed:
            changed[key] = rename(changed[key], partial(_rename_below, function, (*keys, key)))
    return changed


def patterns_in(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str, bool]]:
    """Yield the patterns of tensor names in a recipe's plain values, nested ones too, after the way to each.

    The last value says whether the pattern's mapping has no value for all other tensors.
    """
    if isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from patterns_in(each, (*keys, index))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if "parameters" in keys[:-1] or "scale" in keys:
                yield (*keys, str(key)), str(key), "*" not in value
            yield from patterns_in(each, (*keys, str(key)))


def _rename_below(function: Callable[[str, Keys], str], above: Keys, name: Any, keys: tuple[str, ...]) -> Any:
    return function(name, (*above, *keys))


def check_counts(value: Any, place: Place, keys: Keys = ()) -> None:
    """Check the parameters of a recipe and of those in it against the numbers of their models.

    Raises :class:`~merging.errors.OptionError`, with the place of the first parameter that does not suit.
    """
    if not isinstance(value, Mapping):
        return
    for key in ("models", "stack"):
        for index, each in enumerate(value.get(key) or ()):
            check_counts(each, place, (*keys, key, index))
    for key in ("base", "model"):
        check_counts(value.get(key), place, (*keys, key))
    if not keys or is_recipe(value):
        recipe = make_recipe(dict(value), place(keys))
        try:
            recipe.method.check(len(recipe.models))
        except OptionError as error:
            raise OptionError(f"{place((*keys, *_find_miscounted(recipe, value)))}: {error}") from None


def _find_miscounted(recipe: Recipe, values: Mapping[str, Any]) -> Keys:
    """Return the keys of the first parameter that does not suit the number of models, or of the models."""

    def suits(parameters: dict[str, Any]) -> bool:
        try:
            chain(recipe.method.chain, parameters).check(len(recipe.models))
        except OptionError:
            return False
        return True

    parameters = values.get("parameters") or {} if suits({}) else {}
    return next((("parameters", name) for name in parameters if not suits({name: parameters[name]})), ("models",))


def _is_short(values: Mapping[Any, Any]) -> bool:
    """Return whether values are a recipe that only stacks layers, and has more to say than a stack by itself."""
    return "stack" in values and len(values) > 1


def _with_entries(values: dict[str, Any], place: Place, origin: Place | None) -> dict[str, Any]:
    """Return the values of a recipe with its entries made: stacks of layers, and recipes."""
    values = dict(values)
    if "stack" in values:
        if "models" in values:
            raise OptionError(f"{place(('stack',))}: a recipe has either models or a stack, and this one has both")
        stacked = _make_stack(values.pop("stack"), ("stack",), place, origin)
        values = {"models": [stacked], "method": "passthrough", **values}
    models = values.get("models")
    if isinstance(models, (list, tuple)):
        values["models"] = [_make_entry(each, ("models", i), place, origin) for i, each in enumerate(models)]
    if values.get("base") is not None:
        values["base"] = _make_entry(values["base"], ("base",), place, origin)
    return values


def _make_entry(value: Any, keys: Keys, place: Place, origin: Place | None) -> Entry:
    """Make an entry of a recipe. Raises :class:`~merging.errors.OptionError`."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (str, LayerStack, Recipe)):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        if is_recipe(value):
            shifted = None if origin is None else lambda inner: origin((*keys, *inner))
            return make_recipe(dict(value), place(keys), shifted)
        if "stack" in value:
            return _make_stack(value["stack"], (*keys, "stack"), place, origin)
        return _join_parts([_make_part(value, keys, place, origin)], place(keys))
    shown = ".".join(map(str, keys))
    raise OptionError(
        f"{place(keys)}: {shown} = {plain(value)!r}: should be text, a recipe with models and method, or layers of a "
        f"model: {{model: NAME, layers: 0:8}}"
    )


def _make_stack(value: Any, keys: Keys, place: Place, origin: Place | None) -> LayerStack:
    if not isinstance(value, (list, tuple)) or not value:
        shown = ".".join(map(str, keys))
        raise OptionError(f"{place(keys)}: {shown} should be a list of parts: - {{model: NAME, layers: 0:8}}")
    return _join_parts([_make_part(each, (*keys, i), place, origin) for i, each in enumerate(value)], place(keys))


def _join_parts(parts: list[LayerPart], origin: str) -> LayerStack:
    try:
        return LayerStack(parts=parts)
    except OptionError as error:
        raise OptionError(f"{origin}: {error}") from None


def _make_part(value: Any, keys: Keys, place: Place, origin: Place | None) -> LayerPart:
    """Make a part of a stack: a mapping, or the name of a model with all of its layers."""
    if isinstance(value, (str, Path, Recipe, LayerStack)) or is_recipe(value):
        value = {"model": value}
    shown = ".".join(map(str, keys))
    if not isinstance(value, Mapping):
        raise OptionError(f"{place(keys)}: {shown} = {plain(value)!r}: should be {{model: NAME, layers: 0:8}}")
    for key in map(str, value):
        if key not in _PART:
            raise OptionError(
                f"{place((*keys, key))}: {shown} has no {key!r}{nearest(key, _PART)}: use {', '.join(_PART)}"
            )
    if value.get("model") is None:
        raise OptionError(f"{place(keys)}: {shown} has no 'model': {', '.join(_PART)} are its keys")
    model = _make_entry(value["model"], (*keys, "model"), place, origin)
    try:
        return LayerPart.model_validate({**value, "model": model})
    except ValidationError as error:
        raise describe_invalid(error, place((*keys, *error.errors()[0]["loc"])), f"{shown}.") from None


def _check_keys(values: dict[str, Any], place: Place) -> None:
    """Refuse unknown keys before missing ones, which they may be. Raises :class:`~merging.errors.OptionError`."""
    known = [info.alias or name for name, info in Recipe.model_fields.items()] + ["parameters", "stack"]
    for key in map(str, values):
        if key not in (*FIELDS, *known):
            hint = f" (did you mean {_THEIRS[key]!r}?)" if key in _THEIRS else nearest(key, known)
            if key in _parameters_of(values.get("method")):
                raise OptionError(f"{place((key,))}: {key!r} is a parameter: write it under parameters")
            raise OptionError(f"{place((key,))}: there is no {key!r}{hint}: use {', '.join(known)}")
    for key in ("models", "method"):
        if values.get(key) is None:
            raise OptionError(f"{place((key,))}: the recipe has no {key!r}")


def _parameters_of(method: Any) -> list[str]:
    """Return the names of the parameters of a chain; none of a chain that does not exist."""
    try:
        own = [field for cls in links(method) for field in parameters_of(cls)] if isinstance(method, str) else []
        return [*own, "blocks", "elements"]
    except OptionError:
        return []


def _find_refused(values: dict[str, Any], error: str) -> tuple[str, ...]:
    """Return the keys of the field that an error begins with, of the method, or of the first refused parameter."""
    if field := next((key for key in values if error.startswith(f"{key} = ")), None):
        return (field,)
    method, parameters = str(values.get("method")), values.get("parameters")
    if _is_refused(method, {}):
        return ("method",)
    tried: dict[Any, Any] = {}
    for key, value in parameters.items() if isinstance(parameters, dict) else ():
        tried[key] = value
        if _is_refused(method, tried):
            return ("parameters", str(key))
    return ("parameters",)


def _is_refused(method: str, parameters: dict[Any, Any]) -> bool:
    try:
        chain(method, parameters)
    except (OptionError, AttributeError):  # a name that is not a text has no methods of texts
        return True
    return False
