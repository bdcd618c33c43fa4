"""The metadata of a merged LoRA in a GGUF file, as llama.cpp's converter writes them."""

from __future__ import annotations

from typing import Any

from merging.output.model_card import HUB_ID
from merging.plan.merge_plan import Plan
from merging.sources import Adapter
from merging.sources.gguf.architectures import architecture_of_config
from merging.sources.gguf.loras import ALPHA_KEY
from merging.sources.tied_weights import text_config

__all__ = ["gguf_metadata"]


def gguf_metadata(plan: Plan) -> tuple[str, dict[str, Any]]:
    """Return llama.cpp's name of the architecture, and the metadata.

    The number of heads is stated too, so that the file can be read without its base. The output's name is left out, so
    that the same merge gives the same bytes under any name.
    """
    assert plan.base is not None
    config = text_config(plan.base.config)
    found = architecture_of_config(config.get("model_type"))
    assert found is not None
    architecture = found[0]
    fields: dict[str, Any] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        ALPHA_KEY: float(plan.rank),
        "general.tags": ["lora", "merge"],
    }
    for key, field in (("head_count", "num_attention_heads"), ("head_count_kv", "num_key_value_heads")):
        heads = config.get(field)
        if isinstance(heads, int) and heads > 0:
            fields[f"{architecture}.attention.{key}"] = heads
    base = _base_name(plan)
    if base is not None:
        fields["general.base_model.count"] = 1
        fields["general.base_model.0.name"] = base.rpartition("/")[2]
        fields["general.base_model.0.organization"] = base.partition("/")[0]
        fields["general.base_model.0.repo_url"] = f"https://huggingface.co/{base}"
    return architecture, fields


def _base_name(plan: Plan) -> str | None:
    """Return the base's name on the Hub, if it is known."""
    origin = plan.base.origin if plan.base else None
    stated = [origin.repo if origin else None, *(each.base for each in plan.models if isinstance(each, Adapter))]
    return next((each for each in stated if each and HUB_ID.fullmatch(each)), None)
