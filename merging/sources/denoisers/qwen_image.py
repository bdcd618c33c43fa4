"""Qwen-Image and Qwen-Image-Edit, with the same names everywhere, and Qwen-Image 2.1."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule

__all__ = ["QWEN_IMAGE", "QWEN_IMAGE_21"]

_TO = ("to_q", "to_k", "to_v", "to_out.0")
_TIME = tuple(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2))
_LAST = ("norm_out.linear", "proj_out")

QWEN_IMAGE = Family(
    name="Qwen-Image",
    marks=(
        NameMark(names=r"^transformer_blocks_\d+_(?:img|txt)_(?:mlp_net_|mod_1\.)"),
        NameMark(names=r"^txt_norm\."),
        # Blocks that no other model of this width has.
        NameMark(names=r"^transformer_blocks_(?:19|[2-5]\d)_attn_(?:to|add)_", inputs=frozenset({3072})),
    ),
    modules=(
        *(
            f"transformer_blocks.{{}}.attn.{part}"
            for part in (
                *_TO,
                *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
                *("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
            )
        ),
        *(
            f"transformer_blocks.{{}}.{stream}_{part}"
            for stream in ("img", "txt")
            for part in ("mlp.net.0.proj", "mlp.net.2", "mod.1")
        ),
        *_TIME,
        "img_in",
        "txt_in",
        "txt_norm",
        *_LAST,
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
    modules=(
        *(f"transformer_blocks.{{}}.attn.{part}" for part in (*_TO, "norm_q", "norm_k")),
        "transformer_blocks.{}.img_mlp.out",
        *_TIME,
        "txt_in.text_norm",
        "txt_in.in_layer",
        "txt_in.out_layer",
        "img_in",
        "modulation.1",
        *_LAST,
    ),
)
