"""The metadata at the head of a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merging.sources.plain_yaml import FAULTS, load_yaml
from merging.sources.small_files import is_there, read_text

__all__ = ["stated_base_models", "stated_licence", "stated_tags"]


def stated_licence(card: Path) -> str | None:
    """Return the licence that a model card states, None without a card or a readable head.

    Raises :class:`~merging.errors.FormatError` if the card is not an ordinary file, or its head is hostile.
    """
    licence = _read_head(card).get("license")
    return licence if isinstance(licence, str) else None


def stated_base_models(card: Path) -> list[str]:
    """Return the models that a model card names as its base, in its order.

    Raises :class:`~merging.errors.FormatError` if the card is not an ordinary file, or its head is hostile.
    """
    stated = _read_head(card).get("base_model")
    listed = stated if isinstance(stated, list) else [stated]
    return [name for name in listed if isinstance(name, str) and name]


def stated_tags(card: Path) -> list[str]:
    """Return the tags of a model card, in lower case.

    Raises :class:`~merging.errors.FormatError` if the card is not an ordinary file, or its head is hostile.
    """
    stated = _read_head(card).get("tags")
    return [tag.lower() for tag in stated if isinstance(tag, str)] if isinstance(stated, list) else []


def _read_head(card: Path) -> dict[str, Any]:
    """Return the metadata of a card, empty without a card or a readable head."""
    if not is_there(card):
        return {}
    parts = read_text(card, errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0]:
        return {}
    try:
        facts = load_yaml(parts[1], str(card))
    except FAULTS:
        return {}
    return facts if isinstance(facts, dict) else {}
