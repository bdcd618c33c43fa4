"""LoRAs of llama.cpp whose rows of queries and keys are ordered by heads, which only the base's config counts."""

from __future__ import annotations

from collections.abc import Sequence

from merging.sources import Adapter, Checkpoint, Model
from merging.sources.gguf.loras import order_heads
from merging.sources.tied_weights import text_config

__all__ = ["order_by_heads"]


def order_by_heads(models: Sequence[Model], base: Checkpoint | None) -> list[Model]:
    """Return the models, adapters of GGUF files with their rows in the order of transformers where there is a base.

    Raises :class:`~merging.errors.FormatError` for a base whose heads do not fit.
    """
    if base is None:
        return list(models)
    config = text_config(base.config)
    return [
        order_heads(model, config) if isinstance(model, Adapter) and model.dialect == "GGUF" else model
        for model in models
    ]
