"""HunyuanVideo, under Tencent's names; ComfyUI writes some of them otherwise."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, block_rules
from merging.sources.denoisers.flux import LAST, SINGLE_BLOCKS

__all__ = ["HUNYUAN_VIDEO"]

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    marks=(NameMark(names=r"_blocks_\d+_(?:(?:img|txt)_(?:mlp_fc|mod_linear)|modulation_linear)"),),
    rules=(
        *block_rules(
            "double_blocks.{}",
            "transformer_blocks.{}",
            {
                "img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
                "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "img_attn_proj": "attn.to_out.0",
                "txt_attn_proj": "attn.to_add_out",
                "img_mlp.fc1": "ff.net.0.proj",
                "img_mlp.fc2": "ff.net.2",
                "txt_mlp.fc1": "ff_context.net.0.proj",
                "txt_mlp.fc2": "ff_context.net.2",
                "img_mod.linear": "norm1.linear",
                "txt_mod.linear": "norm1_context.linear",
            },
        ),
        *SINGLE_BLOCKS,
        *block_rules("single_blocks.{}", "single_transformer_blocks.{}", {"modulation.linear": "norm.linear"}),
        *LAST,
    ),
    spellings=(
        (r"_(img|txt)_mlp_fc1\b", r"_\1_mlp_0"),
        (r"_(img|txt)_mlp_fc2\b", r"_\1_mlp_2"),
        (r"^((?:double|single)_blocks_[^_]+_(?:img_mod|txt_mod|modulation))_linear\b", r"\1_lin"),
    ),
)
