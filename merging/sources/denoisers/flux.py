"""Flux.1: dev, schnell, Kontext, Krea and their kin."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["EMBEDDERS", "FLUX", "LAST", "SINGLE_BLOCKS"]

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
"""Blocks whose one layer makes queries, keys, values and the feed-forward part, as HunyuanVideo has them too."""

FLUX = Family(
    name="Flux.1",
    marks=(NameMark(names=r"^(?:double_blocks|single_blocks|single_transformer_blocks)_\d+_"),),
    rules=(
        *block_rules(
            "double_blocks.{}",
            "transformer_blocks.{}",
            {
                "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
                "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "img_attn.proj": "attn.to_out.0",
                "txt_attn.proj": "attn.to_add_out",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
                "img_mod.lin": "norm1.linear",
                "txt_mod.lin": "norm1_context.linear",
            },
        ),
        *SINGLE_BLOCKS,
        *block_rules("single_blocks.{}", "single_transformer_blocks.{}", {"modulation.lin": "norm.linear"}),
        *EMBEDDERS,
        *(
            NameRule(published=f"{theirs}.{layer}_layer", diffusers=(f"time_text_embed.{ours}.linear_{number}",))
            for theirs, ours in (
                ("time_in", "timestep_embedder"),
                ("vector_in", "text_embedder"),
                ("guidance_in", "guidance_embedder"),
            )
            for number, layer in ((1, "in"), (2, "out"))
        ),
        *LAST,
    ),
)
