"""CogVideoX, whose LoRAs all have diffusers' names."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark

__all__ = ["COGVIDEOX"]

COGVIDEOX = Family(
    name="CogVideoX",
    marks=(
        NameMark(names=r"^transformer_blocks_\d+_norm[12]_linear\.|^patch_embed_text_proj"),
        NameMark(names=r"^transformer_blocks_\d+_attn1_to_[qkv]\.weight", inputs=frozenset({1920, 3072})),
    ),
)
