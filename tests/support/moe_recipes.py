"""Recipes of mixtures of two experts with prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["NEGATIVE", "POSITIVE", "two_experts"]

POSITIVE = (["one two three", "four five six seven one", "seven"], ["the cat sat", "a big dog ran in the park", "x"])
NEGATIVE = ["def f return x", "print"]


def two_experts(folder: Path, gate_mode: str, *, negative: bool = False, even: bool = False) -> dict[str, Any]:
    """Two experts with prompts; ``even`` prompts have equal numbers of tokens."""
    prompts = (["one two three", "plus five six"], ["the cat sat", "a big dog"]) if even else POSITIVE
    experts: list[dict[str, Any]] = [
        {"source_model": str(folder / name), "positive_prompts": texts}
        for name, texts in zip("ab", prompts, strict=True)
    ]
    if negative:
        experts[0]["negative_prompts"] = NEGATIVE
    return {"base_model": str(folder / "base"), "gate_mode": gate_mode, "dtype": "float32", "experts": experts}
