"""PEFT's type for trained norms, which replace the base's."""

from __future__ import annotations

from merging.sources.changes import Change, Replacement
from merging.sources.peft.module import Module

__all__ = ["ln_tuning"]


def ln_tuning(module: Module) -> list[Change]:
    """LayerNorm tuning (Zhao et al. 2024, arXiv 2312.11420): the norms themselves, weights and biases."""
    reason = "it is saved in full, and what it changes is the difference from the base"
    module.check("ln_tuning_layers", "ln_tuning_layers.bias", partner="ln_tuning_layers")
    targets = {"ln_tuning_layers": module.target, "ln_tuning_layers.bias": module.bias}
    return [
        Replacement(targets[name], "full", value=stored, needs_base=reason) for name, stored in module.parts.items()
    ]
