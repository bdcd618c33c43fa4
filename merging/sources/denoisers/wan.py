"""Wan 2.1 and 2.2."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["WAN"]

_ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))

WAN = Family(
    name="Wan",
    marks=(NameMark(names=r"^blocks_\d+_(?:(?:self|cross)_attn_[qkvo]\.|cross_attn_[kv]_img\.|attn[12]_to_|ffn_)"),),
    rules=(
        *block_rules(
            "blocks.{}",
            "blocks.{}",
            {
                **{
                    f"{theirs}.{part}": f"{ours}.{name}"
                    for theirs, ours in _ATTENTIONS
                    for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
                },
                "cross_attn.k_img": "attn2.add_k_proj",
                "cross_attn.v_img": "attn2.add_v_proj",
                "cross_attn.norm_k_img": "attn2.norm_added_k",
                **{f"{theirs}.norm_{part}": f"{ours}.norm_{part}" for theirs, ours in _ATTENTIONS for part in "qk"},
                "ffn.0": "ffn.net.0.proj",
                "ffn.2": "ffn.net.2",
                "norm3": "norm2",
                "modulation": "scale_shift_table",
            },
        ),
        NameRule(published="patch_embedding", diffusers=("patch_embedding",)),
        NameRule(published="head.modulation", diffusers=("scale_shift_table",)),
        NameRule(published="head.head", diffusers=("proj_out",)),
        *(
            NameRule(
                published=f"{part}_embedding.{number}",
                diffusers=(f"condition_embedder.{part}_embedder.linear_{name}",),
            )
            for part in ("text", "time")
            for number, name in ((0, 1), (2, 2))
        ),
        NameRule(published="time_projection.1", diffusers=("condition_embedder.time_proj",)),
    ),
)
