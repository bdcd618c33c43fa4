"""Trained rows of embeddings, together with LoRA or alone (PEFT's trainable tokens)."""

from __future__ import annotations

from merging.sources.changes import Change
from merging.sources.peft.module import Module
from merging.sources.token_rows import TokenRows

__all__ = ["TOKENS", "lora_tokens", "trainable_tokens"]

TOKENS = "token_adapter.trainable_tokens_delta"
"""The name of the rows in a LoRA, after the path of their module."""


def trainable_tokens(module: Module) -> list[Change]:
    """Trainable tokens: rows of an embedding, which replace the base's at the indices in the config."""
    return [_rows(module, "trainable_tokens_delta", "token_indices", module.config.get("token_indices"))]


def lora_tokens(module: Module) -> Change:
    """Trainable tokens within a LoRA, whose config may have indices for each of several modules."""
    indices = module.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        fits = [each for name, each in indices.items() if module.path == name or module.path.endswith(f".{name}")]
        indices = fits[0] if fits else None
    return _rows(module, TOKENS, "trainable_token_indices", indices)


def _rows(module: Module, leaf: str, field: str, indices: object) -> TokenRows:
    size = module.sizes(**{leaf: "n h"})
    given = indices if isinstance(indices, list) else []
    whole = all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in given)
    if not whole or not len(given) == len(set(given)) == size["n"]:
        raise module.error(f"holds {size['n']} rows, and {field} in its config are not as many different indices")
    reason = "its rows take the place of the base's, and what they change is the difference"
    return TokenRows(module.target, "tokens", module.part(leaf), tuple(given), needs_base=reason)
