"""HunyuanVideo and HunyuanVideo 1.5, under Tencent's names; ComfyUI has other names for some modules.

ComfyUI also joins the queries, keys and values of 1.5, which Tencent and diffusers keep apart.
"""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules
from merging.sources.denoisers.flux import LAST, SINGLE_BLOCKS

__all__ = ["HUNYUAN_VIDEO", "HUNYUAN_VIDEO_15"]

_NORMS = {
    f"{theirs}_attn_{part}_norm": f"attn.{ours}_{part}"
    for theirs, ours in (("img", "norm"), ("txt", "norm_added"))
    for part in "qk"
}
_DOUBLE_BLOCK = {
    "img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    **_NORMS,
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
}
_REFINER_BLOCK = {
    "self_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
    "norm1": "norm1",
    "norm2": "norm2",
}


def _embedder(published: str, diffusers: str, layers: tuple[str, ...]) -> tuple[NameRule, ...]:
    return tuple(
        NameRule(published=f"{published}.{layer}", diffusers=(f"{diffusers}.linear_{number}",))
        for number, layer in enumerate(layers, 1)
    )


_SHARED = (
    *block_rules("double_blocks.{}", "transformer_blocks.{}", _DOUBLE_BLOCK),
    *block_rules(
        "txt_in.individual_token_refiner.blocks.{}", "context_embedder.token_refiner.refiner_blocks.{}", _REFINER_BLOCK
    ),
    *_embedder("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", ("mlp.0", "mlp.2")),
    *_embedder("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", ("linear_1", "linear_2")),
    NameRule(published="txt_in.input_embedder", diffusers=("context_embedder.proj_in",)),
    NameRule(published="img_in.proj", diffusers=("x_embedder.proj",)),
    *LAST,
)
_COMFYUI = (
    (r"(_(?:img|txt)|_refiner_blocks_(?:\d+|{}))_mlp_fc1(?=\.|$)", r"\1_mlp_0"),
    (r"(_(?:img|txt)|_refiner_blocks_(?:\d+|{}))_mlp_fc2(?=\.|$)", r"\1_mlp_2"),
    (r"^((?:double|single)_blocks_[^_]+_(?:img_mod|txt_mod|modulation))_linear(?=\.|$)", r"\1_lin"),
    (r"^((?:time|guidance)_in|txt_in_t_embedder)_mlp_0(?=\.|$)", r"\1_in_layer"),
    (r"^((?:time|guidance)_in|txt_in_t_embedder)_mlp_2(?=\.|$)", r"\1_out_layer"),
    (r"^txt_in_c_embedder_linear_1(?=\.|$)", "txt_in_c_embedder_in_layer"),
    (r"^txt_in_c_embedder_linear_2(?=\.|$)", "txt_in_c_embedder_out_layer"),
    (r"^(double_blocks_[^_]+_(?:img|txt)_attn)_norm_([qk])[a-z]+_norm_scale$", r"\1_\2_norm.weight"),
    (r"^(single_blocks_[^_]+)_norm_([qk])[a-z]+_norm_scale$", r"\1_\2_norm.weight"),
)
"""Tencent's names, and ComfyUI's names; of norms the other way round."""
_APART = (
    (r"^double_blocks_([^_]+)_img_attn_([qkv])(?=\.|$)", r"transformer_blocks_\1_attn_to_\2"),
    (r"^double_blocks_([^_]+)_txt_attn_([qkv])(?=\.|$)", r"transformer_blocks_\1_attn_add_\2_proj"),
)
"""Tencent's names of the projections in HunyuanVideo 1.5, and diffusers' names."""

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    marks=(
        NameMark(names=r"_blocks_\d+_(?:(?:img|txt)_(?:mlp_fc|mod_linear)|modulation_linear)|individual_token_refiner"),
        NameMark(names=r"^context_embedder_(?:token_refiner|time_text_embed|proj_in)"),
        NameMark(names=r"^(?:double_blocks_19|single_(?:transformer_)?blocks_3[89])_", inputs=frozenset({3072})),
    ),
    rules=(
        *_SHARED,
        *SINGLE_BLOCKS,
        *block_rules(
            "single_blocks.{}",
            "single_transformer_blocks.{}",
            {"modulation.linear": "norm.linear", "q_norm": "attn.norm_q", "k_norm": "attn.norm_k"},
        ),
        *_embedder("time_in", "time_text_embed.timestep_embedder", ("mlp.0", "mlp.2")),
        *_embedder("guidance_in", "time_text_embed.guidance_embedder", ("mlp.0", "mlp.2")),
        *_embedder("vector_in", "time_text_embed.text_embedder", ("in_layer", "out_layer")),
    ),
    spellings=_COMFYUI,
)

HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo 1.5",
    marks=(
        NameMark(names=r"^(?:byt5_in|vision_in|cond_type_embed|context_embedder_2|image_embedder_linear)"),
        NameMark(names=r"^double_blocks_\d+_(?:img|txt)_attn_[qkv]\."),
        NameMark(
            names=r"^(?:double|transformer)_blocks_5[0-3]_\w*attn_(?:qkv|to_q|add_q_proj)\.", inputs=frozenset({2048})
        ),
    ),
    rules=(
        *_SHARED,
        *_embedder("time_in", "time_embed.timestep_embedder", ("mlp.0", "mlp.2")),
        NameRule(published="byt5_in.layernorm", diffusers=("context_embedder_2.norm",)),
        *_embedder("byt5_in", "context_embedder_2", ("fc1", "fc2", "fc3")),
        NameRule(published="vision_in.proj.0", diffusers=("image_embedder.norm_in",)),
        *_embedder("vision_in", "image_embedder", ("proj.1", "proj.3")),
        NameRule(published="vision_in.proj.4", diffusers=("image_embedder.norm_out",)),
        NameRule(published="cond_type_embedding", diffusers=("cond_type_embed",)),
    ),
    spellings=_APART,
)
