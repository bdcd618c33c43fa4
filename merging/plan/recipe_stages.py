"""Recipes of several documents: a later one names an earlier one, and becomes a recipe that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merging.errors import OptionError
from merging.plan.recipe_document import Keys, RecipeDocument
from merging.plan.recipe_values import map_names

__all__ = ["join_stages"]

_DEPTH = 48
"""How deep lists and mappings may be nested when all stages are in their places: 24 stages, one in the other."""

_COPIES = 500
"""The largest number of uses of stages, since each use is a copy, and stages that double would grow without end."""


def join_stages(documents: Sequence[RecipeDocument]) -> tuple[RecipeDocument, list[str]]:
    """Return the last stage with the stages that it names in their places, and remarks.

    The last stage is the document without a ``name``, or else the last document.

    Args:
        documents: documents in our schema, each with its ``name``, which is left out of the result.

    Raises:
        OptionError: for names that stand twice or lead in a circle, and for several documents without a name.
    """
    stages: dict[str, RecipeDocument] = {}
    last = documents[-1]
    unnamed = [document for document in documents if document.values.get("name") is None]
    if len(unnamed) > 1:
        raise OptionError(
            f"{unnamed[1].origin(())}: {len(unnamed)} documents have no name: every one but the last needs one, "
            f"by which later ones use it"
        )
    for document in documents:
        name = document.values.get("name")
        if name is None:
            last = document
            continue
        if not isinstance(name, str) or not name:
            raise OptionError(f"{document.origin(('name',))}: name should be text, and is {name!r:.80}")
        if name in stages:
            raise OptionError(f"{document.origin(('name',))}: there are two documents named {name!r}: rename one")
        stages[name] = document
    joined = _Joining(stages)
    result = joined.join(last)
    notices = [
        f"{stage.origin(('name',))}: no other document uses {name}: it is not made"
        for name, stage in stages.items()
        if stage is not last and name not in joined.used
    ]
    return result, notices


class _Joining:
    """The stages by name, while they are put in each other's places."""

    def __init__(self, stages: Mapping[str, RecipeDocument]) -> None:
        self.stages = stages
        self.used: set[str] = set()
        self.copies = 0
        self.around: list[RecipeDocument] = []

    def join(self, document: RecipeDocument, depth: int = 0) -> RecipeDocument:
        """Return a document with the stages that it names inside; ``depth`` is how deep it is nested itself."""
        self.around.append(document)
        if depth + max(map(len, document.origins)) > _DEPTH:
            raise OptionError(
                f"{document.origin(())}: too many stages need each other in a row: run this one alone, and name its "
                f"output in the stages that need it"
            )
        origins = {keys: origin for keys, origin in document.origins.items() if keys != ("name",)}

        def replace(name: Any, keys: Keys) -> Any:
            stage = self.stages.get(name)
            if stage is None or stage is document:
                return name
            if stage in self.around:
                raise OptionError(f"{document.origin(keys)}: {name} needs this document itself: name another model")
            self.used.add(name)
            self.copies += 1
            if self.copies > _COPIES:
                raise OptionError(
                    f"{document.origin(keys)}: the stages use each other more than {_COPIES} times: run {name} alone, "
                    f"and name its output here"
                )
            inner = self.join(stage, depth + len(keys))
            if "tokenizer" in keys:
                return _tokenizer_of(inner.values, document.origin(keys))
            origins.update({(*keys, *each): origin for each, origin in inner.origins.items() if each})
            return inner.values

        values = {key: value for key, value in map_names(document.values, replace).items() if key != "name"}
        self.around.pop()
        return RecipeDocument(values, origins)


def _tokenizer_of(value: Any, origin: str) -> str:
    """Return the name of the model that a stage's tokenizer comes from: its base, or else its first model."""
    while isinstance(value, Mapping):
        if value.get("tokenizer") is not None:
            raise OptionError(f"{origin}: this stage has a tokenizer of its own: write the source of that one here too")
        inner = value.get("base") or value.get("model") or (value.get("models") or value.get("stack"))
        value = inner[0] if isinstance(inner, list) else inner
    return str(value)
