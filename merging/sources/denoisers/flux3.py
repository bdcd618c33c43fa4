"""Flux.3: blocks for each mode of the input, then blocks for all of them. Nothing is fused."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["FLUX3"]

_MODULATIONS = ("early_stream_modulations", "single_stream_modulations")
_MODES = ("image", "image_cond", "txt")

FLUX3 = Family(
    name="Flux.3",
    marks=(
        NameMark(names=r"^(?:content_|txt_)?mode_blocks_|^(?:early|single)_stream_modulations_"),
        NameMark(names=r"^single_blocks_\d+_(?:[qkv]_proj|attn_out|mlp_(?:in|out))\."),
        NameMark(names=r"^single_transformer_blocks_\d+_ff_linear_(?:in|out)\."),
    ),
    rules=(
        *(
            rule
            for published, diffusers in (
                ("content_mode_blocks.image.{}", "mode_blocks.image.{}"),
                ("content_mode_blocks.image_cond.{}", "mode_blocks.image_cond.{}"),
                ("txt_mode_blocks.{}", "txt_mode_blocks.{}"),
                ("single_blocks.{}", "single_transformer_blocks.{}"),
            )
            for rule in block_rules(
                published,
                diffusers,
                {
                    "q_proj": "attn.to_q",
                    "k_proj": "attn.to_k",
                    "v_proj": "attn.to_v",
                    "attn_out": "attn.to_out.0",
                    "mlp_in": "ff.linear_in",
                    "mlp_out": "ff.linear_out",
                    "norm.query_norm.scale": "attn.norm_q.weight",
                    "norm.key_norm.scale": "attn.norm_k.weight",
                },
            )
        ),
        *(
            NameRule(published=f"{name}.{mode}.lin", diffusers=(f"{name}.{mode}.linear",))
            for name in _MODULATIONS
            for mode in _MODES
        ),
        *(NameRule(published=f"emb_in.{mode}", diffusers=(f"x_embedders.{mode}",)) for mode in ("image", "image_cond")),
        NameRule(published="txt_in", diffusers=("context_embedder",)),
        *(
            NameRule(published=f"{theirs}.{layer}_layer", diffusers=(f"{ours}.linear_{number}",))
            for theirs, ours in (("time_in", "timestep_embedder"), ("ref_time_in", "target_timestep_embedder"))
            for number, layer in ((1, "in"), (2, "out"))
        ),
        NameRule(published="final_layer.image.linear", diffusers=("proj_out",)),
        NameRule(published="final_layer.image.adaLN_modulation.1", diffusers=("norm_out.linear",), swapped=True),
    ),
)
