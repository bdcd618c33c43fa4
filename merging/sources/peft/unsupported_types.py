"""The types of PEFT adapters that are not read, and why."""

from __future__ import annotations

__all__ = ["UNSUPPORTED"]

_PROMPTS = "it learns inputs or attention for a frozen model and changes no weight, so that there is nothing to add up"
_ROUTES = "what it adds depends on each input, so that no weight holds it"
_BAKE = "its formula is not read: bake it with PEFT (merge_and_unload, save_pretrained) and merge what comes out"

UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"), _PROMPTS),
    **dict.fromkeys(("CPT", "CARTRIDGE", "ADAPTION_PROMPT"), _PROMPTS),
    **dict.fromkeys(("LILY", "POLY", "SHADOW", "XLORA"), _ROUTES),
    **dict.fromkeys(("ADAMSS", "BEFT", "DEFT", "FROD", "GLORA", "PEANUT"), _BAKE),
    **dict.fromkeys(("PSOFT", "PVERA", "SUPERTUNING", "TINYLORA", "UNILORA"), _BAKE),
}
"""Reasons, by PEFT's name of the type."""
