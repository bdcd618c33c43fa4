"""Families of diffusion models, recognized by the modules that a LoRA changes, and the names that programs use.

A module's name in a file is a prefix (``transformer.``, ``lora_unet_``) and a path, with dots or flat. Paths are from
the published model (``double_blocks.0.img_attn.qkv``; ``modulation`` are its modules that many blocks share), of
diffusers (``transformer_blocks.0.attn.to_q``), of diffusers where nobody else follows (``own``), or of the publisher's
first release (``first``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from merging.serving.rules import Question
from merging.serving.subject import Subject
from merging.sources.lycoris import leaf_of

__all__ = ["FAMILIES", "DenoiserModule", "NameLayout", "families_of", "modules_of", "names_not_taken"]

NameStyle = Literal["published", "modulation", "diffusers", "own", "first"]
FactorForm = Literal["A", "default", "down"]
"""The factors are ``lora_A`` and ``lora_B``, the same with PEFT's ``default``, or down and up. Methods other than LoRA
have the form ``down``."""

_PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "transformer.base_model.model.", "transformer_2.", "transformer.",
    "unet.base_model.model.", "unet.", "base_model.model.", "Hunyuan_video_I2V_lora_", "lora_unet__", "lora_unet_",
    "lora_transformer_", "lora_prior_unet_", "lycoris_",
)  # fmt: skip
_TEXT = re.compile(r"lora_te|text_encoders?\b|text_encoder_\d|oft_te")

_DOUBLE = r"double_blocks_\d+_(?:img|txt)_(?:attn_(?:qkv|proj)|mlp_[02])"
_FLUX = (
    r"transformer_blocks_\d+_(?:attn_(?:to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)|ff(?:_context)?_net_(?:0_proj|2)"
    r"|norm1(?:_context)?_linear)"
    r"|single_transformer_blocks_\d+_(?:attn_to_[qkv]|proj_mlp|proj_out|norm_linear)"
)
_ENDS = r"|x_embedder|context_embedder|time_text_embed_.*|norm_out_linear|proj_out"
_STREAMS = r"(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)"
_UNET = r"(?:down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding)"
_REFINED = r"(?:layers|noise_refiner|context_refiner)_\d+"
_LTX = r"transformer_blocks_\d+_(?:attn[12]_to_(?:[qkv]|out_0)|ff_net_(?:0_proj|2)"
_QWEN = (
    r"transformer_blocks_\d+_(?:attn_(?:to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)"
    r"|(?:img|txt)_(?:mlp_net_(?:0_proj|2)|mod_1))|img_in|txt_in|norm_out_linear|proj_out|time_text_embed_.*"
)
_HIDREAM = r"(?:double|single)_stream_blocks_\d+_block_.*|caption_projection_.*"
_PREDICT2 = r"blocks_\d+_(?:(?:self|cross)_attn_(?:[qkv]_proj|output_proj)|mlp_layer[12]|adaln_modulation_.*)"
_COSMOS_ENDS = r"|t_embedder_1_linear_[12]|x_embedder_proj_1|final_layer_.*"
_COSMOS = (
    r"transformer_blocks_\d+_(?:attn[12]_to_(?:[qkv]|out_0)|ff_net_(?:0_proj|2)|norm[123]_linear_[12])"
    r"|time_embed_t_embedder_linear_[12]|patch_embed_proj|norm_out_linear_[12]|proj_out"
)
_ERNIE = r"layers_\d+_(?:self_attention_to_(?:[qkv]|out_0)|mlp_(?:gate_proj|up_proj|linear_fc2))"

FAMILIES: dict[str, Mapping[NameStyle, str]] = {
    "Stable Diffusion": {
        "published": r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb)_.*|out_2",
        "own": rf"{_UNET}.*_to_(?:[qkv]|out_0)",
        "diffusers": rf"(?!.*_to_(?:[qkv]|out_0)$){_UNET}.*",
    },
    "Stable Diffusion 3": {
        "published": r"joint_blocks_\d+_(?:x|context)_block_.*",
        "diffusers": r"transformer_blocks_\d+_(?:attn2?_(?:to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)"
        rf"|ff(?:_context)?_net_(?:0_proj|2)|norm1(?:_context)?_linear)|pos_embed_proj{_ENDS}",
    },
    "Flux": {
        "published": rf"{_DOUBLE}|double_blocks_\d+_(?:img|txt)_mod_lin|single_blocks_\d+_(?:linear[12]|modulation_lin)"
        r"|(?:img|txt)_in|(?:time|vector|guidance)_in_(?:in|out)_layer|final_layer_.*|distilled_guidance_layer_.*",
        "diffusers": _FLUX + _ENDS,
    },
    "Flux.2": {
        "published": rf"{_DOUBLE}|single_blocks_\d+_linear[12]|(?:img|txt)_in|final_layer_.*",
        "modulation": rf"{_STREAMS}_lin",
        "diffusers": r"transformer_blocks_\d+_attn_(?:to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)",
        "own": r"transformer_blocks_\d+_ff(?:_context)?_linear_(?:in|out)"
        rf"|single_transformer_blocks_\d+_attn_(?:to_qkv_mlp_proj|to_out)|{_STREAMS}_linear",
    },
    "HunyuanVideo": {
        "published": rf"{_DOUBLE}|double_blocks_\d+_(?:img|txt)_mod_lin|single_blocks_\d+_(?:linear[12]|modulation_lin)"
        r"|txt_in_individual_token_refiner_.*",
        "first": r"double_blocks_\d+_(?:img|txt)_(?:attn_(?:qkv|proj)|mlp_fc[12]|mod_linear)"
        r"|single_blocks_\d+_(?:linear[12]|modulation_linear)",
        "diffusers": _FLUX + r"|context_embedder_.*",
    },
    "Wan": {
        "published": r"blocks_\d+_(?:(?:self|cross)_attn_(?:[qkvo]|[kv]_img)|ffn_[02]|norm3|modulation)"
        r"|(?:text|time|img)_(?:embedding|projection|emb)_.*|patch_embedding|head_head",
        "diffusers": r"blocks_\d+_(?:attn[12]_(?:to_[qkv]|to_out_0|add_[kv]_proj)|ffn_net_(?:0_proj|2)|norm2)"
        r"|condition_embedder_.*",
    },
    "Qwen-Image": {"published": _QWEN, "diffusers": _QWEN},
    "Z-Image": {
        "published": rf"{_REFINED}_(?:attention_(?:qkv|out)|feed_forward_w[123]|adaLN_modulation_0)",
        "diffusers": rf"{_REFINED}_(?:attention_(?:to_[qkv]|to_out_0)|feed_forward_w[123]|adaLN_modulation_0)",
    },
    "Lumina 2": {
        "published": rf"{_REFINED}_(?:attention_(?:qkv|out)|feed_forward_w[123]|adaLN_modulation_1)",
        "diffusers": rf"{_REFINED}_(?:attn_(?:to_[qkv]|to_out_0)|feed_forward_linear_[123]|norm1_linear)",
    },
    "LTX-Video": {
        "published": rf"{_LTX})|patchify_proj|adaln_single_.*|caption_projection_.*|proj_out",
        "diffusers": rf"{_LTX})|proj_in|time_embed_.*|caption_projection_.*|proj_out",
    },
    "LTX-2": {
        "published": rf"{_LTX}|(?:audio_attn[12]|audio_to_video_attn|video_to_audio_attn)_to_(?:[qkv]|out_0)"
        r"|audio_ff_net_(?:0_proj|2))|(?:audio_)?patchify_proj|\w*adaln_single_.*|text_embedding_projection_.*",
        "diffusers": rf"{_LTX}|(?:audio_attn[12]|audio_to_video_attn|video_to_audio_attn)_to_(?:[qkv]|out_0)"
        r"|audio_ff_net_(?:0_proj|2))|(?:audio_)?proj_in|(?:audio_)?time_embed_.*|av_cross_attn_.*",
    },
    "HiDream": {"published": _HIDREAM, "diffusers": _HIDREAM},
    "Anima": {"published": rf"{_PREDICT2}{_COSMOS_ENDS}|llm_adapter_.*", "diffusers": _COSMOS},
    "Cosmos Predict 2": {"published": _PREDICT2 + _COSMOS_ENDS, "diffusers": _COSMOS},
    "Cosmos Predict 1": {
        "published": r"blocks_block\d+_blocks_[012]_(?:block_(?:attn_to_(?:[qkv]_0|out_0)|layer[12])"
        rf"|adaLN_modulation_[12]){_COSMOS_ENDS}",
        "diffusers": _COSMOS,
    },
    "Mochi": {
        "published": r"blocks_\d+_(?:attn_(?:qkv|proj)_[xy]|mlp_[xy]_w[12]|mod_[xy])|t5_y_embedder_.*|t5_yproj"
        r"|t_embedder_mlp_[02]|final_layer_.*",
        "diffusers": r"transformer_blocks_\d+_(?:attn1_(?:to_(?:[qkv]|out_0|add_out)|add_[qkv]_proj)"
        r"|ff(?:_context)?_net_(?:0_proj|2)|norm1(?:_context)?_linear)|time_embed_.*|norm_out_linear|proj_out",
    },
    "CogVideoX": {
        "own": r"transformer_blocks_\d+_(?:attn1_to_(?:[qkv]|out_0)|ff_net_(?:0_proj|2)|norm[12]_linear)"
        r"|patch_embed_text_proj|time_embedding_linear_[12]|norm_out_linear|proj_out",
    },
    "Ernie-Image": {"published": _ERNIE, "diffusers": _ERNIE},
}
"""Patterns of the names of each family's modules, without prefix and without dots."""

NameLayout = tuple[str, NameStyle, str]
"""Names that a program takes: the prefix, the style of the path, and the forms, separated by spaces."""


@dataclass(frozen=True, slots=True)
class DenoiserModule:
    """A module of a denoiser, as a file names it."""

    name: str
    prefix: str
    path: str
    """Flat, without the prefix."""
    form: FactorForm


def modules_of(names: Iterable[str]) -> list[DenoiserModule]:
    """Return the denoiser's modules that a LoRA's tensors belong to, without text encoders."""
    found: dict[str, DenoiserModule] = {}
    for name in names:
        part = leaf_of(name)
        if part is None or _TEXT.match(name) or part[1] == "alpha":
            continue
        prefix = next((each for each in _PREFIXES if name.startswith(each)), "")
        default: FactorForm = "default" if ".default." in name else "A"
        form: FactorForm = default if ".lora_A" in name or ".lora_B" in name else "down"
        path = part[0].removeprefix(prefix).replace(".", "_")
        found[part[0]] = DenoiserModule(part[0], prefix, path, form)
    return list(found.values())


@cache
def _pattern(family: str, style: NameStyle) -> re.Pattern[str]:
    return re.compile(FAMILIES[family][style])


def _styles(family: str, path: str) -> Iterator[NameStyle]:
    yield from (style for style in FAMILIES[family] if _pattern(family, style).fullmatch(path))


def families_of(modules: Iterable[DenoiserModule]) -> list[str]:
    """Return the families that know the most modules. The list is empty if no family knows any."""
    paths = [module.path for module in modules]
    counts = {family: sum(any(_styles(family, path)) for path in paths) for family in FAMILIES}
    most = max(counts.values())
    return [family for family, count in counts.items() if count == most] if most else []


def names_not_taken(takes: Mapping[str, tuple[NameLayout, ...]], *, by: Literal["all", "some"]) -> Question:
    """Return a question for modules under names that a program does not load.

    Args:
        takes: The names that it loads, by family. The key "" is for names in every family.
        by: ``"all"`` for modules that it loads in no family that they may belong to, ``"some"`` for modules that it
            loads in some of these families.
    """

    def ask(subject: Subject) -> Iterator[str]:
        modules = modules_of(subject.tensors)
        families = families_of(modules)
        for module in modules:
            known = [family for family in families if any(_styles(family, module.path))]
            taken = [_takes((*takes[""], *takes.get(family, ())), family, module) for family in known]
            if known and by == "all" and not any(taken):
                yield module.name
            if by == "some" and any(taken) and not all(taken):
                others = (family for family, takes_it in zip(known, taken, strict=True) if not takes_it)
                yield f"{module.name}: not for {' and '.join(others)}"

    return ask


def _takes(layouts: Iterable[NameLayout], family: str, module: DenoiserModule) -> bool:
    styles = set(_styles(family, module.path))
    return any(
        module.prefix == prefix and style in styles and module.form in forms.split() for prefix, style, forms in layouts
    )
