"""What the Hub reads out of a repository's files: the card's data, tags, base models, the number of parameters."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["base_models", "front_matter", "library", "parameters", "tags"]

Card = dict[str, Any]


def front_matter(readme: str) -> Card:
    """The fields at the head of a card: scalars, and lists of scalars below their key; others are left out."""
    lines = readme.splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    card: Card = {}
    key = ""
    for line in lines[1 : lines.index("---", 1)]:
        name, colon, value = line.partition(":")
        if line.lstrip().startswith("- ") and isinstance(card.get(key), list):
            card[key].append(_scalar(line.lstrip()[2:]))
        elif colon and not line.startswith((" ", "#")):
            key = name
            card[key] = _scalar(value) or []
    return {name: value for name, value in card.items() if value}


def _scalar(text: str) -> str:
    text = re.sub(r"(^|\s)#.*", "", text).strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def library(card: Card, names: Iterable[str]) -> str | None:
    """The library that the card names, or that the files are known by."""
    names = set(names)
    guess = "peft" if "adapter_config.json" in names else "transformers" if "config.json" in names else None
    return card.get("library_name", guess)


def base_models(card: Card, names: Iterable[str]) -> tuple[str, list[str]] | None:
    """How the model stands to its bases (adapter, merge, finetune, quantized), and the bases."""
    bases = _list(card.get("base_model"))
    if not bases:
        return None
    guess = "adapter" if "adapter_config.json" in set(names) else "merge" if len(bases) > 1 else "finetune"
    return card.get("base_model_relation", guess), bases


def tags(card: Card, names: Iterable[str]) -> list[str]:
    """The tags that the Hub gives for the card and the files, by which models are found."""
    names = set(names)
    found = [*_list(library(card, names)), *_list(card.get("tags"))]
    if any(name.endswith(".safetensors") for name in names):
        found.append("safetensors")
    if stands := base_models(card, names):
        relation, bases = stands
        found += [tag for base in bases for tag in (f"base_model:{base}", f"base_model:{relation}:{base}")]
    return found + [f"license:{name}" for name in _list(card.get("license"))]


def _list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def parameters(safetensors: Iterable[Path]) -> Card | None:
    """How many parameters the safetensors files hold, by dtype and in total, from their headers."""
    counts: Counter[str] = Counter()
    for path in safetensors:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                return None
            try:
                header = json.loads(file.read(size))
            except ValueError:
                return None
        for name, tensor in header.items():
            if name != "__metadata__":
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
    return {"parameters": dict(counts), "total": counts.total()} if counts else None
