"""Flux.2 (dev, klein). Single blocks keep queries, keys, values and the feed-forward part in one layer everywhere."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules
from merging.sources.denoisers.flux import EMBEDDERS, LAST, STREAM_ATTENTIONS

__all__ = ["FLUX2"]

FLUX2 = Family(
    name="Flux.2",
    marks=(
        NameMark(
            names=r"(?:single|double)_stream_modulation_?(?:img|txt)?_lin|_to_qkv_mlp_proj\b|_ff(?:_context)?_linear_(?:in|out)\b"
        ),
        # The rest has Flux.1's names.
        NameMark(names=r"^single_blocks_\d+_linear1\.", ratio=9),
        NameMark(names=r"^double_blocks_\d+_(?:img|txt)_mlp_0\.", ratio=6),
        NameMark(names=r"^double_blocks_\d+_(?:img|txt)_attn_", inputs=frozenset({4096, 6144})),
    ),
    rules=(
        *block_rules(
            "double_blocks.{}",
            "transformer_blocks.{}",
            {
                **STREAM_ATTENTIONS,
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
        ),
        *block_rules(
            "single_blocks.{}",
            "single_transformer_blocks.{}",
            {
                "linear1": "attn.to_qkv_mlp_proj",
                "linear2": "attn.to_out",
                "norm.query_norm.scale": "attn.norm_q.weight",
                "norm.key_norm.scale": "attn.norm_k.weight",
            },
        ),
        *(
            NameRule(published=f"{name}.lin", diffusers=(f"{name}.linear",))
            for name in ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
        ),
        *EMBEDDERS,
        *(
            NameRule(
                published=f"{name}_in.{layer}_layer",
                diffusers=(f"time_guidance_embed.{ours}_embedder.linear_{number}",),
            )
            for name, ours in (("time", "timestep"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        ),
        *LAST,
    ),
    variants=(("klein", "Flux.2 klein"),),
)
