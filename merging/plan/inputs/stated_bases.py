"""Adapters that state a base of another type than the base they are merged into."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.errors import MergingError, option
from merging.hub.address import hub_address, local_path
from merging.plan.checks import same_base
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.model_config import read_config
from merging.sources.model_families import family_by_statements
from merging.sources.small_files import is_there
from merging.sources.tied_weights import text_config

__all__ = ["describe_other_bases"]

_MODULE = re.compile(r"transformers\.models\.(\w{1,60})\.", re.ASCII)
"""A module of transformers, with the type of its models."""

_SAME_NAME = ("Gemma", "Llama", "Qwen")
"""Families whose models all have the family's name in their type."""


def describe_other_bases(models: Sequence[Model], base: Checkpoint | None) -> list[str]:
    """Return a notice for each adapter that states a base of another type. Nothing is downloaded.

    The type of the stated base is taken from its config, if it is at hand. Else the module of transformers in the
    adapter's ``auto_mapping`` shows it, or the family in the base's name, if the base in use has another name.
    """
    own = _types_of(base.config) if base is not None else set()
    if base is None or not own:
        return []
    used = base.origin.repo if base.origin else str(base.path)
    notices = []
    for model in models:
        if isinstance(model, Adapter) and model.base:
            stated = _stated_types(model, model.base, used)
            if stated and not any(one in other or other in one for one in stated for other in own):
                notices.append(
                    f"{model.path}: states the base {model.base} ({min(stated)}), and {base.path} ({min(own)}) is "
                    f"used: changes trained on another model do not help, although the shapes fit: check "
                    f"{option('base')}"
                )
    return notices


def _stated_types(adapter: Adapter, name: str, used: str) -> set[str]:
    """Return the types of the base that an adapter states, empty if nothing shows them or it seems to be ``used``."""
    types = _types_of(_config_at_hand(name))
    if types:
        return types
    mapping = adapter.config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
    module = _MODULE.match(library) if isinstance(library, str) else None
    if module:
        return {_letters(module[1])}
    family = None if same_base(name, used) else family_by_statements({}, name)
    first = re.match("[A-Za-z]+", family.name) if family is not None else None
    return {first[0].lower()} if first and first[0] in _SAME_NAME else set()


def _types_of(config: Mapping[str, Any]) -> set[str]:
    """Return the types of a model and of the language model in it, as letters and digits."""
    stated = (config.get("model_type"), text_config(config).get("model_type"))
    return {_letters(each) for each in stated if isinstance(each, str) and each}


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower()).removesuffix("text")


def _config_at_hand(name: str) -> dict[str, Any]:
    """Return the config of a model in a folder, or in the Hub's cache; empty if it is not there."""
    try:
        path = _find_config(name)
        return read_config(path) if path is not None and is_there(path) else {}
    except (MergingError, ValueError):  # no path, no name on the Hub, or no config
        return {}


def _find_config(name: str) -> Path | None:
    address = hub_address(name)
    if address is None:
        return local_path(name) / "config.json"
    if address.in_store:
        return None
    from huggingface_hub import try_to_load_from_cache

    inner = f"{address.path}/config.json" if address.path else "config.json"
    found = try_to_load_from_cache(address.repo, inner, revision=address.revision)
    return Path(found) if isinstance(found, str) else None
