"""CogVideoX, whose LoRAs all have diffusers' names."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["COGVIDEOX"]

_BLOCK = (
    *(f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
    *(f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("linear", "norm")),
    "ff.net.0.proj",
    "ff.net.2",
)
_AROUND = (
    *(f"patch_embed.{part}" for part in ("proj", "text_proj", "pos_embedding")),
    *(f"{name}.linear_{number}" for name in ("time_embedding", "ofs_embedding") for number in (1, 2)),
    *("norm_final", "norm_out.linear", "norm_out.norm", "proj_out"),
)

COGVIDEOX = Family(
    name="CogVideoX",
    marks=(
        NameMark(names=r"^transformer_blocks_\d+_norm[12]_linear\.|^patch_embed_text_proj"),
        NameMark(names=r"^transformer_blocks_\d+_attn1_to_[qkv]\.weight", inputs=frozenset({1920, 3072})),
    ),
    rules=(
        *block_rules("transformer_blocks.{}", "transformer_blocks.{}", {name: name for name in _BLOCK}),
        *(NameRule(published=name, diffusers=(name,)) for name in _AROUND),
    ),
)
