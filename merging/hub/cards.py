"""What a model card says in the metadata at its head."""

from __future__ import annotations

from pathlib import Path

import yaml

__all__ = ["stated_licence"]


def stated_licence(card: Path) -> str | None:
    """The licence in the metadata at the head of a model card, if there is one."""
    try:
        text = card.read_text(encoding="utf-8")
        facts = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    return licence if isinstance(licence, str) else None
