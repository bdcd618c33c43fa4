"""The metadata at the head of a model card."""

from __future__ import annotations

from pathlib import Path

from merging.sources.plain_yaml import FAULTS, load_yaml
from merging.sources.small_files import is_there, read_text

__all__ = ["stated_licence"]


def stated_licence(card: Path) -> str | None:
    """Return the licence that a model card states, None without a card or a readable head.

    Raises :class:`~merging.errors.FormatError` if the card is not an ordinary file, or its head is hostile.
    """
    if not is_there(card):
        return None
    parts = read_text(card, errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0]:
        return None
    try:
        facts = load_yaml(parts[1], str(card))
    except FAULTS:
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    return licence if isinstance(licence, str) else None
