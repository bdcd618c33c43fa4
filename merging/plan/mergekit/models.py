"""Models as recipes of mergekit name them: a path or an address, with a revision, and an adapter on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from merging.plan.mergekit.reading import Reading
from merging.plan.mergekit.schema import PATH, REFERENCE
from merging.plan.recipe_document import Keys

__all__ = ["Entry", "read_model"]

Entry: TypeAlias = str | dict[str, Any]
"""A model in our schema: its name, or a recipe that makes it."""

_FORMS = "write a path, org/name@revision, or base+adapter"


def read_model(reading: Reading, keys: Keys, folder: Path) -> Entry:
    """Return the model at the keys as our schema names it.

    Args:
        reading: the document.
        keys: the way to the model.
        folder: the folder to which relative paths are relative. A path with ``+`` or ``@`` that exists is a path.

    Raises:
        OptionError: for a value that names no model.
    """
    value = reading.value(keys)
    if isinstance(value, str):
        return _parse(reading, keys, value, folder)
    if not isinstance(value, dict):
        raise reading.error(keys, f"{_key(keys)} should name a model, and is {value!r:.80}: {_FORMS}")
    values = reading.check_keys(keys, "a model", REFERENCE)
    if "path" in values:
        return _read_path(reading, keys, folder)
    if "revision" in values:
        reading.ignore((*keys, "revision"), "revision belongs to a path: write {path: NAME, revision: REVISION}")
    if values.get("model") is None:
        raise reading.error(keys, f"{_key(keys)} names no model: {_FORMS}")
    if values.get("override_architecture") is not None:
        reading.note((*keys, "override_architecture"), "override_architecture has no effect: names alone count")
    model = _read_path(reading, (*keys, "model"), folder)
    if values.get("lora") is None:
        return model
    return _with_adapter(model, _read_path(reading, (*keys, "lora"), folder))


def _key(keys: Keys) -> str:
    return next((key for key in reversed(keys) if isinstance(key, str)), "model")


def _read_path(reading: Reading, keys: Keys, folder: Path) -> str:
    """Return the name of a path and its revision, which are text or a mapping."""
    value = reading.value(keys)
    if isinstance(value, dict):
        values = reading.check_keys(keys, "a path", PATH)
        path, revision = values.get("path"), values.get("revision")
        if isinstance(path, str) and path and (revision is None or (isinstance(revision, (str, int)) and revision)):
            return path if revision is None else f"{path}@{revision}"
        raise reading.error(keys, f"{_key(keys)} should have a path, and is {value!r:.80}: {_FORMS}")
    if not isinstance(value, str) or not value:
        raise reading.error(keys, f"{_key(keys)} should name a model, and is {value!r:.80}: {_FORMS}")
    return _one_revision(reading, keys, value, folder)


def _parse(reading: Reading, keys: Keys, text: str, folder: Path) -> Entry:
    if not text.strip():
        raise reading.error(keys, f"{_key(keys)} is empty: {_FORMS}")
    if _exists(text, folder) or "+" not in text:
        return _one_revision(reading, keys, text, folder)
    parts = text.split("+")
    if len(parts) > 2 or not all(parts):
        raise reading.error(keys, f"{text}: one + joins a model and an adapter: write base+adapter")
    model, adapter = (_one_revision(reading, keys, part, folder) for part in parts)
    return _with_adapter(model, adapter)


def _one_revision(reading: Reading, keys: Keys, text: str, folder: Path) -> str:
    if text.count("@") > 1 and not _exists(text, folder):
        raise reading.error(keys, f"{text}: one @ stands before a revision: write org/name@revision")
    return text


def _exists(text: str, folder: Path) -> bool:
    try:
        return (folder / text).exists() or Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _with_adapter(model: str, adapter: str) -> Entry:
    """Return the recipe of a model with an adapter baked in."""
    return {"models": [adapter], "method": "task_arithmetic", "base": model, "as": "model"}
