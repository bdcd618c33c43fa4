"""The metadata at the head of a model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from merging.sources.plain_yaml import FAULTS, load_yaml
from merging.sources.small_files import is_there, read_text

__all__ = ["stated_base_models", "stated_licence", "stated_quantization", "stated_tags"]

_QUANTIZATION = "The following `bitsandbytes` quantization config was used during training:"
_PAIRS = re.compile(r"\s*((?:- \w+: .*\n?)+)")
_WORDS = {"True": True, "False": False, "None": None}


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


def stated_quantization(card: Path) -> dict[str, Any] | None:
    """Return the config of bitsandbytes that PEFT wrote into the card of an adapter, None without one.

    Raises :class:`~merging.errors.FormatError` if the card is not an ordinary file.
    """
    text = read_text(card, errors="replace") if is_there(card) else ""
    pairs = _PAIRS.match(text.partition(_QUANTIZATION)[2])
    if pairs is None:
        return None
    stated: dict[str, Any] = {"quant_method": "bitsandbytes"}
    for line in pairs[1].splitlines():
        name, _, value = line.removeprefix("- ").partition(": ")
        listed = re.findall(r"['\"]([^'\"]+)['\"]", value) if value.startswith("[") else None
        stated.setdefault(name, _WORDS.get(value.strip(), value.strip()) if listed is None else listed)
    return stated if stated.get("load_in_4bit") is True or stated.get("load_in_8bit") is True else None


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
