"""The family of models that a model or an adapter belongs to, by its names, else by statements about it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from merging.maths.shapes import Shape, Shapes
from merging.sources.denoisers import Family, family_of, is_denoiser
from merging.sources.lora_names import split_component
from merging.sources.trainers import Attribution

__all__ = ["family_by_config", "family_by_names", "family_by_statements"]

_STATEMENTS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model")
"""Entries of headers that name the base."""

_WORDS: tuple[tuple[str, str], ...] = (
    ("sdxl|stable-diffusion-xl", "Stable Diffusion XL"),
    ("sd3|stable-diffusion-3", "Stable Diffusion 3"),
    ("sd_?v?2|stable-diffusion-v2", "Stable Diffusion 2"),
    ("sd_?v?1|sd15|stable-diffusion-v1", "Stable Diffusion 1"),
    ("chroma", "Chroma"),
    (r"flux[-_. ]?2", "Flux.2"),
    (r"flux[-_. ]?1|flux", "Flux.1"),
    (r"framepack|hunyuan[-_ ]?video", "HunyuanVideo"),
    (r"qwen[-_ ]?image", "Qwen-Image"),
    (r"z[-_ ]?image", "Z-Image"),
    (r"lumina", "Lumina 2"),
    (r"hidream", "HiDream"),
    (r"\bltx", "LTX-Video"),
    (r"cosmos", "Cosmos"),
    (r"\bwan", "Wan"),
    (r"gpt-oss", "gpt-oss"),
    (r"deepseek", "DeepSeek"),
    (r"qwen[-_ ]?3[-_.]5", "Qwen3.5"),
    (r"qwen[-_ ]?3[-_ ]next", "Qwen3-Next"),
    (r"qwen[-_ ]?3", "Qwen3"),
    (r"qwen[-_ ]?2\.5", "Qwen2.5"),
    (r"qwen[-_ ]?2", "Qwen2"),
    (r"mixtral", "Mixtral"),
    (r"ministral|mistral", "Mistral"),
    (r"gemma[-_ ]?(\d)", r"Gemma \1"),
    (r"llama[-_ ]?(\d)", r"Llama \1"),
    (r"tinyllama", "Llama 2"),
    (r"phi[-_ ]?(\d)", r"Phi-\1"),
)
"""Words in the names of bases, the most specific first, and their families."""

_LANGUAGE: tuple[tuple[str, str], ...] = (
    (r"\.linear_attn\.in_proj_(?:qkvz|ba)(?:\.|$)", "Qwen3-Next"),
    (r"\.linear_attn\.in_proj_(?:qkv|z|a|b)(?:\.|$)", "Qwen3.5"),
    (r"\.block_sparse_moe\.", "Mixtral"),
    (r"(?:^|\.)h\.\d+\.(?:attn\.c_attn|mlp\.c_fc)(?:\.|$)", "GPT-2"),
    (r"\.experts\.gate_up_projs\.\d+", "gpt-oss"),
)
"""Names of modules that only one family of language models has."""

_CLASS = re.compile(r"([A-Za-z]\w{1,39}?)(?:For[A-Z]\w{1,39}|LMHeadModel|Model)", re.ASCII)
"""The class of a model in transformers: the family, and its task."""

_NAMES = "the names of its tensors"


def family_by_names(shapes: Shapes, metadata: Mapping[str, str]) -> Attribution | None:
    """Return the family that tensors belong to by their names and ``shapes``, None if they do not show it.

    The header's ``metadata`` may show the model of the family.
    """
    parts: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        component, inner = split_component(name)
        parts[component][inner] = shape
    for component in ("denoiser", "denoiser_2"):
        family = family_of(parts[component]) if parts[component] else None
        if family and _is_certain(family, shapes):
            paired = family.paired if parts["denoiser_2"] else ""
            return Attribution(paired, _NAMES) if paired else _variant(family, metadata)
    for pattern, name in _LANGUAGE:
        if any(re.search(pattern, each) for each in shapes):
            return Attribution(name, _NAMES)
    return None


def _is_certain(family: Family, names: Iterable[str]) -> bool:
    """Return whether the names are of a denoiser, and not of a language model with similar names."""
    return any(not name.startswith("base_model.") or is_denoiser(name.rpartition(".")[0]) for name in names)


def _variant(family: Family, metadata: Mapping[str, str]) -> Attribution:
    for key in _STATEMENTS:
        stated = metadata.get(key, "").lower()
        for word, name in family.variants:
            if word in stated:
                return Attribution(name, f"{_NAMES}, and {key} in its header")
    return Attribution(family.name, _NAMES)


def family_by_statements(metadata: Mapping[str, str], base: str | None) -> Attribution | None:
    """Return the family by the entries of a header, or by the name of the base; None if neither is understood."""
    stated = [(metadata.get(key), f"{key} in its header") for key in _STATEMENTS]
    for text, evidence in [*stated, (base, "the name of its base")]:
        for pattern, name in _WORDS if text else ():
            found = re.search(pattern, str(text), re.IGNORECASE)
            if found:
                return Attribution(found.expand(name), evidence)
    return None


def family_by_config(config: Mapping[str, Any], base: Mapping[str, Any]) -> Attribution | None:
    """Return the family by an adapter's config, or by the config of its ``base``; None if neither states it."""
    mapping = config.get("auto_mapping")
    stated = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    found = _CLASS.fullmatch(stated) if isinstance(stated, str) else None
    if found:
        return Attribution(found[1], "auto_mapping in its config")
    kind = base.get("model_type")
    if isinstance(kind, str) and re.fullmatch(r"[\w.-]{1,60}", kind, re.ASCII):
        return Attribution(kind, "model_type in the config of its base")
    return None
