"""Models of sentence-transformers among the inputs: the model whose modules the output has, and differences of others.

The weights of modules are merged, as the weights of all components are. The rest of a folder (pooling, normalization,
prompts) cannot be merged, and comes from one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging.sources import Checkpoint, Model
from merging.sources.sentence_modules import MODULES, module_settings
from merging.sources.small_files import is_there

__all__ = ["describe_differences", "modules_model"]


def modules_model(models: Sequence[Model], base: Checkpoint | None) -> Checkpoint | None:
    """Return the model whose modules the output has: the base, or else the first model that has any."""
    checkpoints = [model for model in (base, *models) if isinstance(model, Checkpoint)]
    return next((model for model in checkpoints if _folder_of(model) is not None), None)


def describe_differences(models: Sequence[Model], base: Checkpoint | None) -> list[str]:
    """Return a notice for each model whose modules are others, or have another pooling, than the output's."""
    own = modules_model(models, base)
    folder = None if own is None else _folder_of(own)
    if own is None or folder is None:
        return []
    wanted, notices = module_settings(folder), []
    for model in models:
        other = _folder_of(model) if isinstance(model, Checkpoint) and model is not own else None
        settings = wanted if other is None else module_settings(other)
        if settings != wanted:
            theirs, ours = _first_difference(settings, wanted)
            notices.append(f"{model.path} has {theirs} where {own.path} has {ours}: the output has the latter")
    return notices


def _folder_of(model: Checkpoint) -> Path | None:
    """Return the folder of a model of sentence-transformers, None for other models."""
    return model.folder if model.folder is not None and is_there(model.folder / MODULES) else None


def _first_difference(one: list[tuple[str, Any]], other: list[tuple[str, Any]]) -> tuple[str, str]:
    for (kind, settings), (other_kind, other_settings) in zip(one, other, strict=False):
        if kind != other_kind:
            return f"the module {kind}", f"{other_kind}"
        if settings != other_settings:
            return _describe(kind, settings), _describe(other_kind, other_settings)
    longer = max(one, other, key=len)[min(len(one), len(other))][0]
    return ("a module " + longer, "none") if len(one) > len(other) else ("no module", longer)


def _describe(kind: str, settings: dict[str, Any]) -> str:
    return f"{kind} ({', '.join(f'{key} {str(value)[:80]}' for key, value in settings.items())})"
