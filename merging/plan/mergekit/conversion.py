"""Recipes of ours as recipes of mergekit that mean the same, or a refusal that names the difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merging.errors import OptionError
from merging.plan.mergekit.chains import defaults_of
from merging.plan.mergekit.writing import write_documents
from merging.plan.recipe import Recipe
from merging.plan.recipe_files import parse_recipe

__all__ = ["to_mergekit"]

_MISSING = object()


def to_mergekit(recipe: Recipe) -> str:
    """Return a recipe in mergekit's schema, as YAML: one document, or one for each stage.

    What is written is read back and compared, so that nothing of the recipe is lost.

    Raises:
        OptionError: for a recipe that mergekit cannot say. It names the part.
    """
    text = write_documents(recipe)
    again = parse_recipe(text, "the recipe for mergekit").recipe
    for keys, ours, theirs in _differences(_normalize(recipe.to_dict()), _normalize(again.to_dict())):
        own, there = (
            repr(_default_of(each, keys) if value is _MISSING else value)
            for each, value in ((recipe, ours), (again, theirs))
        )
        raise OptionError(f"mergekit cannot say {'.'.join(map(str, keys))} = {own}: there it is {there}")
    return text


def _default_of(recipe: Recipe, keys: tuple[Any, ...]) -> Any:
    """Return the default of a parameter or field that a recipe does not state."""
    if keys[:-1] == ("parameters",):
        return defaults_of(recipe.method.chain).get(keys[-1])
    info = Recipe.model_fields.get(str(keys[0])) if len(keys) == 1 else None
    return None if info is None else info.default


def _normalize(value: Any) -> Any:
    """Return plain values of a recipe with equal forms of a value made alike."""
    if isinstance(value, Mapping):
        if set(value) == {"*"}:
            return _normalize(value["*"])
        return {key: _normalize(each) for key, each in value.items() if key != "allow_unmatched"}
    if isinstance(value, list):
        items = [_normalize(each) for each in value]
        numbers = all(isinstance(each, (int, float, str)) for each in items)
        return items[0] if items and numbers and all(each == items[0] for each in items) else items
    if isinstance(value, str) and ":" in value and " else " not in value:
        points = value.split(":")
        return f"{value} else {points[0]}" if points[0] == points[-1] else value
    return value


def _differences(ours: Any, theirs: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Yield the keys at which two recipes differ, and both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys((*ours, *theirs)):
            yield from _differences(ours.get(key, _MISSING), theirs.get(key, _MISSING), (*keys, key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(one, other, (*keys, index))
    elif ours != theirs:
        yield keys, ours, theirs
