"""The recipes under tests/recipes, and exact and deterministic forms of them that the peer can be asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from support.paths import TESTS

__all__ = ["RECIPES", "drops_at_random", "exact", "whole"]

RECIPES = {file.stem: file for file in sorted((TESTS / "recipes").glob("*.yml"))}
"""The files of the corpus by their names."""


def exact(text: str) -> str:
    """Return the recipe computed and written in float64; stages are written in their own types."""

    def change(document: dict[str, Any]) -> dict[str, Any]:
        rest = {key: value for key, value in document.items() if key != "out_dtype"}
        stored = document.get("out_dtype", document.get("dtype"))
        return rest | {"dtype": "float64"} | ({"out_dtype": stored} if "name" in document and stored else {})

    return _change(text, change)


def drops_at_random(text: str) -> bool:
    """Return whether a stage of the recipe drops changes at random."""
    return bool(re.search(r"merge_method: (dare|della)", text)) and whole(text) != _change(text, lambda each: each)


def whole(text: str) -> str:
    """Return the recipe with nothing dropped: each density 1, each epsilon 0."""
    return _change(text, lambda document: _keep_all(document) if _is_random(document) else document)


def _is_random(document: dict[str, Any]) -> bool:
    return str(document.get("merge_method")).startswith(("dare", "della"))


def _keep_all(value: Any) -> Any:
    if isinstance(value, dict):
        fixed = {"density": 1, "epsilon": 0}
        return {key: fixed[key] if key in fixed else _keep_all(each) for key, each in value.items()}
    return [_keep_all(each) for each in value] if isinstance(value, list) else value


def _change(text: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    documents = [document for document in yaml.safe_load_all(text) if document]
    return yaml.safe_dump_all([change(document) for document in documents], sort_keys=False)
