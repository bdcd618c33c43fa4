"""The entries that every weights file of an output has in its header: the recipe, its sources, and the versions."""

from __future__ import annotations

import json

from merging.maths.lazy_torch import torch
from merging.output.lora_header import lora_metadata
from merging.plan.merge_plan import Plan
from merging.version import __version__

__all__ = ["DEVICE_KEY", "RECIPE_KEY", "SOURCES_KEY", "VERSION_KEYS", "header_metadata"]

RECIPE_KEY, SOURCES_KEY = "merging_recipe", "merging_sources"
DEVICE_KEY = "merging_device"
"""The entry of outputs that were not made on the CPU."""
VERSION_KEYS = ("merging_version", "torch_version")


def header_metadata(plan: Plan, device: torch.device | None = None) -> dict[str, str]:
    """Return the recipe as JSON, its sources with commits or keys of their content, versions, and a LoRA's entries.

    ``device`` is the device that the output is made on, which is stated if it is not the CPU.
    """
    metadata = {RECIPE_KEY: json.dumps(plan.recipe.to_dict(), ensure_ascii=False)}
    if plan.sources:
        metadata[SOURCES_KEY] = json.dumps([each.to_dict() for each in plan.sources], ensure_ascii=False)
    metadata |= dict(zip(VERSION_KEYS, (__version__, torch.__version__), strict=True))
    if device is not None and device.type != "cpu":
        metadata[DEVICE_KEY] = device.type
    return metadata | lora_metadata(plan) if plan.output == "adapter" else metadata
