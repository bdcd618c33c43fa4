"""Names of models in recipes of mixtures: a path, a name on the Hub, or either with a LoRA on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merging.errors import OptionError, nearest
from merging.plan.recipe_document import Keys

__all__ = ["ModelName", "parse_model_name"]

Place = Callable[[Keys], str]
"""A function that returns the place of a value from its keys, for errors."""


@dataclass(frozen=True, slots=True)
class ModelName:
    """The name of a model, and of a LoRA on it if there is one; each is a path or ``org/name@revision``."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return self.model if self.lora is None else f"{self.model}+{self.lora}"

    def map(self, function: Callable[[str], str]) -> ModelName:
        """Return the name with ``function`` applied to both parts."""
        return replace(self, model=function(self.model), lora=None if self.lora is None else function(self.lora))


def parse_model_name(value: Any, keys: Keys, place: Place, folder: Path | None = None) -> ModelName:
    """Read a model's name: ``path``, ``org/name@revision``, ``model+lora``, or a mapping of ``model`` and ``lora``.

    Args:
        value: the value in a recipe.
        keys: its keys, for errors.
        place: the place of a value.
        folder: the recipe's folder; a path that exists there may have a ``+`` in it.

    Raises:
        OptionError: for other values, and for unknown keys.
    """
    if isinstance(value, str) and value:
        exists = Path(value).expanduser().exists() or (folder is not None and (folder / value).exists())
        model, plus, lora = (value, "", "") if exists else value.partition("+")
        if not model or (plus and not lora):
            raise OptionError(f"{place(keys)}: {value!r} should be a model, or model+lora")
        return ModelName(model, lora or None)
    if not isinstance(value, dict):
        raise OptionError(f"{place(keys)}: {keys[-1]} should be the name of a model, and is {str(value)[:80]!r}")
    known = ("path", "revision") if "path" in value else ("model", "lora", "override_architecture")
    for key in map(str, value):
        if key not in known:
            raise OptionError(
                f"{place((*keys, key))}: there is no {key!r}{nearest(key, known)}: use {', '.join(known)}"
            )
    if "path" in value:
        return ModelName(_at_revision(value, keys, place))
    if value.get("override_architecture") is not None:
        raise OptionError(
            f"{place((*keys, 'override_architecture'))}: architectures are read from the model's config, and not given"
        )
    if "model" not in value:
        raise OptionError(f"{place(keys)}: {keys[-1]} has no 'model'")
    inner = {key: _inner_name(value.get(key), (*keys, key), place) for key in ("model", "lora")}
    if inner["model"] is None:
        raise OptionError(f"{place((*keys, 'model'))}: the model has no name")
    return ModelName(inner["model"], inner["lora"])


def _inner_name(value: Any, keys: Keys, place: Place) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if not isinstance(value, dict):
        raise OptionError(f"{place(keys)}: {keys[-1]} should be a name, or path and revision, and is {value!r}")
    for key in map(str, value):
        if key not in ("path", "revision"):
            raise OptionError(
                f"{place((*keys, key))}: there is no {key!r}{nearest(key, ('path', 'revision'))}: use path, revision"
            )
    return _at_revision(value, keys, place)


def _at_revision(value: dict[str, Any], keys: Keys, place: Place) -> str:
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not path:
        raise OptionError(f"{place(keys)}: path should be a name, and is {path!r}")
    if revision is not None and not isinstance(revision, str):
        raise OptionError(
            f"{place((*keys, 'revision'))}: revision should be text, and is {revision!r}: write it in quotes"
        )
    return path if revision is None else f"{path}@{revision}"
