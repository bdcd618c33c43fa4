"""Recipes with ranges: a search begins where parameters are ranges, choices or ``?``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merging.errors import OptionError
from merging.plan.recipe_document import parse_documents
from merging.plan.recipe_files import read_recipe
from merging.plan.recipe_settings import Setting
from merging.searches.spaces import is_searched, read_space
from merging.sources.small_files import RECIPE_LIMIT, read_text

__all__ = ["is_recipe_file", "read_search_recipe"]


def is_recipe_file(model: str | Path) -> bool:
    """Return whether a model's name is a recipe's file."""
    return str(model).endswith((".yml", ".yaml"))


def read_search_recipe(path: str | Path) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
    """Read a recipe whose parameters may be ranges.

    Args:
        path: the file, with ``models``, ``method`` and ``parameters``.

    Returns:
        The models, the recipe's options, and the candidate that the method and its parameters are.

    Raises:
        MergingError: for a recipe that cannot be read, and for models that are recipes themselves.
    """
    documents = parse_documents(read_text(Path(path), RECIPE_LIMIT, given=True), str(path))
    values = documents[0].values
    parameters = values.get("parameters") if len(documents) == 1 else None
    listed = values.get("models") or []
    if not isinstance(parameters, dict) or not isinstance(values.get("method"), str) or not isinstance(listed, list):
        raise OptionError(f"{path}: a search begins with models, a method and parameters, some of them ranges")
    candidate = {"method": values["method"], "parameters": parameters}
    space = read_space(candidate, len(listed))
    middle = space.candidate((0.5,) * len(space.dimensions))
    changes = [
        Setting(f"parameters.{key}", middle.parameters[key]) for key in parameters if is_searched(parameters[key])
    ]
    recipe = read_recipe(path, changes).recipe
    names = [each for each in recipe.models if isinstance(each, str)]
    if len(names) < len(recipe.models) or not isinstance(recipe.base, (str, type(None))):
        raise OptionError(f"{path}: the models of a search are files or names: merge the recipes among them first")
    stated = recipe.model_fields_set - {"models", "method"}
    options = {name: getattr(recipe, name) for name in stated if getattr(recipe, name) is not None}
    return names, options, [candidate]
