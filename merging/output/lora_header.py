"""The header and the file name of a merged LoRA in each format."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from merging.output.peft_config import NO_VARIANTS, adapter_config, lora_config, rank_patterns
from merging.plan.merge_plan import Plan
from merging.plan.names.peft_names import PREFIX
from merging.sources import Adapter
from merging.sources.diffusion_loras import WEIGHTS, modern_name
from merging.sources.lora_headers import METADATA_KEY
from merging.sources.peft import CONFIG_KEY

__all__ = ["lora_metadata", "lora_stem"]

_LOWER = re.compile(r"\.lora_(?:A|down)\.weight$")
"""The ending of a lower factor's name, after the module."""


def lora_stem(plan: Plan, folder: Path) -> str:
    """Return the file's name without suffix, as each program looks for it."""
    stems = {"peft": "adapter_model", "diffusers": Path(WEIGHTS[0]).stem}
    return stems.get(plan.format, folder.name)


def lora_metadata(plan: Plan) -> dict[str, str]:
    """Return the metadata that programs read in the header of a merged LoRA.

    From the inputs' own headers only the kind of model is kept, as Kohya's headers hold captions and paths.
    """
    if plan.header == "peft":
        return {CONFIG_KEY: json.dumps(adapter_config(plan))}
    if plan.header == "diffusers":
        return {METADATA_KEY: json.dumps(_configs(plan))}
    return _kohya(plan) if plan.header == "kohya" else {}


def _configs(plan: Plan) -> dict[str, object]:
    """Return PEFT's config for each component, with modules by their full names."""
    modules: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for name, rank in ((modern_name(out.name), out.shape[0]) for out in plan.outs if out.shape):
        if _LOWER.search(name):
            component, _, module = _LOWER.sub("", name).partition(".")
            # PEFT matches endings, so that this name fits text encoders with and without the level text_model.
            modules[component][module.removeprefix(PREFIX).removeprefix("text_model.")] = rank
    found: dict[str, object] = {}
    for component, ranks in sorted(modules.items()):
        others = rank_patterns(ranks, plan.rank)
        patterns = {"rank_pattern": others, "alpha_pattern": others}
        own = lora_config(rank=plan.rank, target_modules=ranks, **{**NO_VARIANTS, **patterns})
        found |= {f"{component}.{key}": value for key, value in own.items()}
    return found


def _kohya(plan: Plan) -> dict[str, str]:
    """Return the fields of sd-scripts that other programs use: the rank and alpha, and the kind of model."""
    ranks = {int(constant.value) for constant in plan.constants if constant.out.name.endswith(".alpha")}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    vectors = any(out.name.endswith(("_norm", ".diff_b")) for out in plan.outs)
    return {
        "ss_network_module": "lycoris.kohya" if vectors else "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        **_family(plan),
        **_agreed_fields(plan),
    }


def _agreed_fields(plan: Plan) -> dict[str, str]:
    """Return the header fields on which all inputs that state them agree."""
    configs = [model.config for model in plan.models if isinstance(model, Adapter)]
    found = {key: {config[key] for config in configs if key in config} for key in ("ss_base_model_version", "ss_v2")}
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def _family(plan: Plan) -> dict[str, str]:
    """Return the kind of model that follows from names and widths, if any."""
    shapes = {out.name: out.shape for out in plan.outs}
    if any(re.match(r"lora_unet_(?:input|middle|output)_block", name) for name in shapes):
        return {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("_attn2_to_k.lora_down.weight")}
    by_width = {768: {"ss_base_model_version": "sd_v1", "ss_v2": "False"}, 1024: {"ss_v2": "True"}}
    return by_width.get(widths.pop(), {}) if len(widths) == 1 else {}
