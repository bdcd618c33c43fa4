"""Flux.1 (dev, schnell, Kontext, Krea), and Chroma, which has its blocks and another guidance."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["CHROMA", "EMBEDDERS", "FLUX", "LAST", "SINGLE_BLOCKS", "STREAM_ATTENTIONS"]

STREAM_ATTENTIONS = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
"""The attention of a block with a stream of the image and a stream of the text, as Flux.2 has it too."""

EMBEDDERS = (
    NameRule(published="img_in", diffusers=("x_embedder",)),
    NameRule(published="txt_in", diffusers=("context_embedder",)),
)
LAST = (
    NameRule(published="final_layer.linear", diffusers=("proj_out",)),
    NameRule(published="final_layer.adaLN_modulation.1", diffusers=("norm_out.linear",), swapped=True),
)
SINGLE_BLOCKS = (
    NameRule(
        published="single_blocks.{}.linear1",
        diffusers=tuple(
            f"single_transformer_blocks.{{}}.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
        narrow=True,
    ),
    NameRule(published="single_blocks.{}.linear2", diffusers=("single_transformer_blocks.{}.proj_out",)),
)
"""Blocks with one layer for queries, keys, values and the feed-forward part, as HunyuanVideo has them too."""

_BLOCKS = (
    *block_rules(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            **STREAM_ATTENTIONS,
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
    ),
    *SINGLE_BLOCKS,
    *block_rules(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        {
            "modulation.lin": "norm.linear",
            "norm.query_norm.scale": "attn.norm_q.weight",
            "norm.key_norm.scale": "attn.norm_k.weight",
        },
    ),
    *EMBEDDERS,
    *LAST,
)

FLUX = Family(
    name="Flux.1",
    marks=(
        NameMark(names=r"^(?:double_blocks|single_blocks|single_transformer_blocks)_\d+_"),
        NameMark(names=r"^transformer_blocks_\d+_(?:ff|norm1)_context_", inputs=frozenset({3072})),
    ),
    rules=(
        *_BLOCKS,
        *(
            NameRule(published=f"{theirs}.{layer}_layer", diffusers=(f"time_text_embed.{ours}.linear_{number}",))
            for theirs, ours in (
                ("time_in", "timestep_embedder"),
                ("vector_in", "text_embedder"),
                ("guidance_in", "guidance_embedder"),
            )
            for number, layer in ((1, "in"), (2, "out"))
        ),
    ),
    variants=(("chroma", "Chroma"), ("kontext", "Flux.1 Kontext"), ("krea", "Flux.1 Krea")),
)

CHROMA = Family(
    name="Chroma",
    marks=(NameMark(names="^distilled_guidance_layer_"),),
    rules=(
        *_BLOCKS,
        *block_rules(
            "distilled_guidance_layer",
            "distilled_guidance_layer",
            {
                "layers.{}.in_layer": "layers.{}.linear_1",
                "layers.{}.out_layer": "layers.{}.linear_2",
                "norms.{}.scale": "norms.{}.weight",
            },
        ),
    ),
    modules=("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"),
)
