"""Qwen-Image and Qwen-Image-Edit, with the same names everywhere, and Qwen-Image 2.1."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule

__all__ = ["QWEN_IMAGE", "QWEN_IMAGE_21"]

QWEN_IMAGE = Family(
    name="Qwen-Image",
    marks=(
        NameMark(names=r"^transformer_blocks_\d+_(?:img|txt)_(?:mlp_net_|mod_1\.)"),
        NameMark(names=r"^txt_norm\."),
        # Blocks that no other model of this width has.
        NameMark(names=r"^transformer_blocks_(?:19|[2-5]\d)_attn_(?:to|add)_", inputs=frozenset({3072})),
    ),
    variants=(("edit", "Qwen-Image-Edit"),),
)

QWEN_IMAGE_21 = Family(
    name="Qwen-Image 2.1",
    marks=(NameMark(names=r"^transformer_blocks_\d+_img_mlp_(?:gate_up|gate_layer|proj|out)\."),),
    rules=(
        NameRule(
            published="transformer_blocks.{}.img_mlp.gate_up",
            diffusers=("transformer_blocks.{}.img_mlp.gate_layer", "transformer_blocks.{}.img_mlp.proj"),
        ),
    ),
    shared=r"",
)
