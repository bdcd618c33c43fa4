"""What the header of a merged LoRA's file says in each format, and what the file is called."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from merging.companions import adapter_config
from merging.plan.items import Plan
from merging.sources import Adapter
from merging.sources.diffusion import METADATA_KEY, WEIGHTS
from merging.sources.peft import CONFIG_KEY

__all__ = ["lora_metadata", "lora_stem"]

_LEAF = ".lora_A.weight"


def lora_stem(plan: Plan, folder: Path) -> str:
    """What the file is called in its folder, without its ending: as each program looks for it."""
    return {"peft": "adapter_model", "diffusers": Path(WEIGHTS[0]).stem, "kohya": folder.name}[plan.format]


def lora_metadata(plan: Plan) -> dict[str, str]:
    """What the program that a merged LoRA is for reads in its header.

    Of the inputs' own headers only the kind of model is kept: those of Kohya's hold captions and paths.
    """
    if plan.format == "peft":
        return {CONFIG_KEY: json.dumps(adapter_config(plan))}
    return {METADATA_KEY: json.dumps(_configs(plan))} if plan.format == "diffusers" else _kohya(plan)


def _configs(plan: Plan) -> dict[str, object]:
    """A config of PEFT's for each component: one rank, alpha equal to it, its modules by their full names."""
    modules: defaultdict[str, list[str]] = defaultdict(list)
    for name in (out.name for out in plan.outs if out.name.endswith(_LEAF)):
        component, _, module = name.removesuffix(_LEAF).partition(".")
        modules[component].append(module)
    config = {
        "peft_type": "LORA",
        "r": plan.rank,
        "lora_alpha": plan.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return {
        f"{component}.{key}": value
        for component, names in sorted(modules.items())
        for key, value in {**config, "target_modules": sorted(names)}.items()
    }


def _kohya(plan: Plan) -> dict[str, str]:
    adapters = [model for model in plan.models if isinstance(model, Adapter)]
    ranks = {int(constant.value) for constant in plan.constants if constant.out.name.endswith(".alpha")}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    kept = {key: {adapter.config.get(key) for adapter in adapters} for key in ("ss_base_model_version", "ss_v2")}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        **{key: str(values.pop()) for key, values in kept.items() if len(values) == 1 and None not in values},
    }
