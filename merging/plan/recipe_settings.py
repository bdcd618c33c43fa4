"""Values of a recipe changed from outside: ``scale=0.5``, ``models.1=other``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.errors import OptionError, nearest
from merging.methods import links, owner_of, parameters_of
from merging.plan.layer_stack import LayerPart
from merging.plan.recipe import FIELDS, Recipe
from merging.plan.recipe_document import Keys, RecipeDocument, parse_value
from merging.plan.recipe_values import is_recipe

__all__ = ["Setting", "change_document", "is_from_setting", "parse_setting"]

_ALIASES = {name: info.alias for name, info in Recipe.model_fields.items() if info.alias}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value to set.

    Attributes:
        key: the way to it, with dots: ``models.1``.
        value: the value, a plain one.
    """

    key: str
    value: Any


def parse_setting(text: str) -> Setting:
    """Read ``KEY=VALUE``, the value as YAML. Raises :class:`~merging.errors.OptionError`."""
    key, sign, value = text.partition("=")
    if not key.strip() or not sign:
        raise OptionError(f"--set {text}: is no setting: write KEY=VALUE, such as scale=0.5")
    return Setting(key.strip(), parse_value(value, f"--set {key.strip()}"))


def is_from_setting(origin: str) -> bool:
    """Return whether the origin of a value is a setting, and not a line of the recipe."""
    return origin.startswith("--set ")


def change_document(document: RecipeDocument, settings: Sequence[Setting]) -> RecipeDocument:
    """Return a recipe's document with some values changed; ``document`` stays as it is.

    A method is set first, as it decides which parameters there are. Raises :class:`~merging.errors.OptionError` for a
    key that leads nowhere.
    """
    values, origins = document.values, dict(document.origins)
    for setting in sorted(settings, key=lambda each: each.key.split(".")[-1] != "method"):
        keys = _find(values, setting.key)
        values = _replace(values, keys, setting.value)
        origins = {each: origin for each, origin in origins.items() if each[: len(keys)] != keys}
        origins[keys] = f"--set {setting.key}"
    return RecipeDocument(values, origins)


def _replace(values: Any, keys: Keys, value: Any) -> Any:
    """Return a copy of nested values with one of them replaced or added."""
    if not keys:
        return value
    first, rest = keys[0], keys[1:]
    if isinstance(values, list):
        return [_replace(each, rest, value) if index == first else each for index, each in enumerate(values)]
    return {**(values or {}), first: _replace((values or {}).get(first), rest, value)}


def _find(values: Mapping[str, Any], key: str) -> Keys:
    """Return the keys that a text with dots means in a recipe."""
    words = key.split(".")
    nested = _enter(values, words)
    if nested is not None:
        above, inner = nested
        below = ".".join(words[len(above) :])
        if is_recipe(inner):
            return (*above, *_find(inner, below))
        if below in LayerPart.model_fields:
            return (*above, below)
    if words[0] not in (*FIELDS, "parameters", "stack"):
        words.insert(0, "parameters")
    if words[0] != "parameters":
        alias = _ALIASES.get(words[0], words[0])
        first = words[0] if words[0] in values else alias
        return _descend(values.get(first), words[1:], (first,), key)
    parameters = values.get("parameters") or {}
    if len(words) == 1:
        return ("parameters",)
    if not isinstance(parameters, dict):
        raise OptionError(f"--set {key}: parameters should be a mapping of names to values, and is {parameters!r}")
    name, rest = _parameter(values, parameters, words[1:], key)
    return _descend(parameters.get(name), rest, ("parameters", name), key)


def _enter(values: Mapping[str, Any], words: Sequence[str]) -> tuple[Keys, Mapping[str, Any]] | None:
    """Return the first recipe or part of a stack that words lead into, and its keys; None if they lead into none."""
    keys: Keys = ()
    inner: Any = values
    for word in words[:-1]:
        if isinstance(inner, list):
            index = int(word) if word.isdecimal() and int(word) < len(inner) else None
            if index is None:
                return None
            keys, inner = (*keys, index), inner[index]
        elif isinstance(inner, Mapping) and word in ("models", "base", "stack", "model") and word in inner:
            keys, inner = (*keys, word), inner[word]
        else:
            return None
        if isinstance(inner, Mapping):
            return keys, inner
    return None


def _parameter(values: Mapping[str, Any], present: Mapping[str, Any], words: list[str], key: str) -> tuple[str, Keys]:
    """Return the name of the parameter that words begin with, as the recipe spells it, and the words behind it."""
    method = values.get("method")
    if not isinstance(method, str):
        raise OptionError(f"--set {key}: the recipe has no method yet, so it has no parameters: --set method=NAME")
    if words[0] in ("blocks", "elements"):  # of every method
        return words[0], tuple(words[1:])
    classes = links(method)
    known = [field for cls in classes for field in parameters_of(cls)]
    owned = {cls.name: parameters_of(cls) for cls in classes}
    linked = len(words) > 1 and words[1] in owned.get(words[0], ())
    name, rest = (".".join(words[:2]), words[2:]) if linked else (words[0], words[1:])
    if not linked and name not in known and (near := nearest(name, [*known, *Recipe.model_fields])):
        raise OptionError(f"--set {key}: neither the recipe nor {method} has {name!r}{near}")
    try:
        owner = owner_of(name, classes, method)
    except OptionError as error:
        raise OptionError(f"--set {key}: {error}") from None
    field = name.rpartition(".")[2]
    spellings = (field, f"{classes[owner].name}.{field}")
    return next((each for each in spellings if each in present), name), tuple(rest)


def _descend(value: Any, words: Sequence[str | int], keys: Keys, key: str) -> Keys:
    """Return the keys of a value below another; a name in a mapping may have dots itself."""
    if not words:
        return keys
    above = ".".join(map(str, keys))
    if isinstance(value, list):
        index = next((index for index in range(len(value)) if str(index) == words[0]), None)
        if index is None:
            counted = f"{above}.0 to {above}.{len(value) - 1}" if len(value) > 1 else f"{above}.0"
            raise OptionError(f"--set {key}: {above} is a list, whose values are {counted if value else 'none'}")
        return _descend(value[index], words[1:], (*keys, index), key)
    if isinstance(value, dict):
        for count in range(len(words), 0, -1):
            name = ".".join(map(str, words[:count]))
            if name in value:
                return _descend(value[name], words[count:], (*keys, name), key)
        wanted, names = ".".join(map(str, words)), [str(each) for each in value]
        near = nearest(wanted, names) or f": it has {', '.join(names)}"
        raise OptionError(f"--set {key}: {above} has no {wanted!r}{near}")
    stated = "is not in the recipe" if value is None else f"is {value!r}"
    raise OptionError(f"--set {key}: {above} {stated}, so there is nothing below it: set {above} itself")
