"""PEFT's types that hold what takes the place of the base's tensors: trained norms, and rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from merging.sources.adapter import Change, Replacement
from merging.sources.computed import Place
from merging.sources.peft.module import Module

__all__ = ["ln_tuning", "trainable_tokens"]


def ln_tuning(module: Module) -> list[Change]:
    """LayerNorm tuning (Zhao et al. 2024, arXiv 2312.11420): the norms themselves, weights and biases."""
    reason = "it is saved in full, and what it changes is the difference from the base"
    module.check("ln_tuning_layers", "ln_tuning_layers.bias", beside="ln_tuning_layers")
    targets = {"ln_tuning_layers": module.target, "ln_tuning_layers.bias": module.bias}
    return [
        Replacement(targets[name], "full", value=stored, needs_base=reason) for name, stored in module.parts.items()
    ]


def trainable_tokens(module: Module) -> list[Change]:
    """Trainable tokens: rows of an embedding, which take the place of the base's at the indices in the config.

    ``rows [n, width]`` against ``n`` of the base's: a change of rank ``n``.
    """
    size = module.sizes(trainable_tokens_delta="n h")
    indices = module.config.get("token_indices")
    whole = isinstance(indices, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices
    )
    if not whole or not len(indices) == len(set(indices)) == size["n"]:
        raise module.error(f"holds {size['n']} rows, and token_indices in its config are not as many different indices")

    def formula(parts: Mapping[str, Tensor], place: Place) -> tuple[Tensor, Tensor]:
        rows = parts["trainable_tokens_delta"]
        down = rows.new_zeros(len(rows), place.width)
        down[range(len(rows)), indices] = 1
        return rows.T - place.weight[:, indices], down

    return [
        module.computed(
            formula,
            "trainable_tokens_delta",
            kind="embedding",
            outputs=size["h"],
            factored=True,
            trained=size["n"],
            allows=lambda outputs, width: max(indices) < width,
            needs_base="its rows take the place of the base's, and what they change is the difference",
        )
    ]
