"""Merge fine-tuned models and LoRA adapters, from files or as tensors.

``merge`` works on files, lazily and in bounded memory. ``merge_state_dicts`` and ``merge_deltas`` work on tensors on
any device, touch no file, and pass gradients to the coefficients."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from merging.errors import FormatError, InputError, MergingError, MergingWarning, OptionError, OutputError
from merging.version import __version__

if TYPE_CHECKING:
    from merging.api.against_sources import verify_against_sources
    from merging.api.bake import bake
    from merging.api.extract import extract, resize
    from merging.api.merge_files import Merged, merge, preview
    from merging.api.merge_tensors import merge_deltas, merge_state_dicts
    from merging.api.peft_model import merge_peft
    from merging.api.peft_tensors import peft_deltas, peft_state_dict
    from merging.api.predict import predict
    from merging.api.rerun import rerun
    from merging.compression import compress, decompress
    from merging.continual import ContinualStore
    from merging.geometry import compare, suggest
    from merging.maths.delta import Delta, Dense, LowRank
    from merging.methods import METHODS
    from merging.methods.chains import chain
    from merging.methods.contract.function import method
    from merging.moe import make_moe
    from merging.plan.layer_stack import LayerPart, LayerStack
    from merging.plan.recipe import Recipe
    from merging.plan.recipe_files import load_recipe
    from merging.recycling.workflow import Recycled, recycle
    from merging.searches.workflow import Found, search
    from merging.soups import soup
    from merging.statistics import CollectedStatistics, collect_merged_statistics, collect_statistics

_WHERE = {
    "CollectedStatistics": "statistics",
    "ContinualStore": "continual",
    "Delta": "maths.delta",
    "Dense": "maths.delta",
    "Found": "searches.workflow",
    "LayerPart": "plan.layer_stack",
    "LayerStack": "plan.layer_stack",
    "LowRank": "maths.delta",
    "METHODS": "methods",
    "Merged": "api.merge_files",
    "Recipe": "plan.recipe",
    "Recycled": "recycling.workflow",
    "bake": "api.bake",
    "chain": "methods.chains",
    "collect_merged_statistics": "statistics",
    "collect_statistics": "statistics",
    "compare": "geometry",
    "compress": "compression",
    "decompress": "compression",
    "extract": "api.extract",
    "load_recipe": "plan.recipe_files",
    "make_moe": "moe",
    "merge": "api.merge_files",
    "merge_deltas": "api.merge_tensors",
    "merge_peft": "api.peft_model",
    "merge_state_dicts": "api.merge_tensors",
    "method": "methods.contract.function",
    "peft_deltas": "api.peft_tensors",
    "peft_state_dict": "api.peft_tensors",
    "predict": "api.predict",
    "preview": "api.merge_files",
    "recycle": "recycling.workflow",
    "rerun": "api.rerun",
    "resize": "api.extract",
    "search": "searches.workflow",
    "soup": "soups",
    "suggest": "geometry",
    "verify_against_sources": "api.against_sources",
}
"""Public names that are imported at their first use, since most of them import torch."""

__all__ = [
    "METHODS",
    "CollectedStatistics",
    "ContinualStore",
    "Delta",
    "Dense",
    "FormatError",
    "Found",
    "InputError",
    "LayerPart",
    "LayerStack",
    "LowRank",
    "Merged",
    "MergingError",
    "MergingWarning",
    "OptionError",
    "OutputError",
    "Recipe",
    "Recycled",
    "__version__",
    "bake",
    "chain",
    "collect_merged_statistics",
    "collect_statistics",
    "compare",
    "compress",
    "decompress",
    "extract",
    "load_recipe",
    "make_moe",
    "merge",
    "merge_deltas",
    "merge_peft",
    "merge_state_dicts",
    "method",
    "peft_deltas",
    "peft_state_dict",
    "predict",
    "preview",
    "recycle",
    "rerun",
    "resize",
    "search",
    "soup",
    "suggest",
    "verify_against_sources",
]


logging.getLogger(__name__).addHandler(logging.NullHandler())  # nothing is printed unless a program asks for it


if not TYPE_CHECKING:  # which reports names that are not there

    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
