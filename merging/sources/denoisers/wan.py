"""Wan 2.1 and 2.2, and their kin of the same blocks: VACE, Animate, SkyReels, ChronoEdit."""

from __future__ import annotations

from collections.abc import Iterator

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["WAN_FAMILIES"]

_ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
_BLOCK = {
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
}
_FACE = {
    "linear1_q": "to_q",
    "linear1_kv": "to_k to_v",
    "linear2": "to_out",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}


def _embedders() -> Iterator[NameRule]:
    names = {
        **{
            f"{part}_embedding.{number}": f"{part}_embedder.linear_{name}"
            for part in ("text", "time")
            for number, name in ((0, 1), (2, 2))
        },
        "time_projection.1": "time_proj",
        "img_emb.emb_pos": "image_embedder.pos_embed",
        "img_emb.proj.0": "image_embedder.norm1",
        "img_emb.proj.1": "image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "image_embedder.ff.net.2",
        "img_emb.proj.4": "image_embedder.norm2",
    }
    for published, diffusers in names.items():
        yield NameRule(published=published, diffusers=(f"condition_embedder.{diffusers}",))


_RULES = (
    *block_rules("blocks.{}", "blocks.{}", _BLOCK),
    *block_rules("vace_blocks.{}", "vace_blocks.{}", {**_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}),
    *block_rules("face_adapter.fuser_blocks.{}", "face_adapter.{}", _FACE),
    *(
        NameRule(published=name, diffusers=(name,))
        for name in ("patch_embedding", "vace_patch_embedding", "pose_patch_embedding")
    ),
    NameRule(published="head.modulation", diffusers=("scale_shift_table",)),
    NameRule(published="head.head", diffusers=("proj_out",)),
    *_embedders(),
)
_INNER = r"^blocks_\d+_(?:self_attn_[qkvo]|cross_attn_[qkvo]|attn[12]_to_(?:[qkv]|out_0)|ffn_0|ffn_net_0_proj)\.weight"


_VERSIONS = tuple((word, "Wan 2.2") for word in ("wan2.2", "wan-2.2", "wan_2.2", "wan22", "wan_22"))


def _family(name: str, *marks: NameMark, versions: tuple[tuple[str, str], ...] = (), paired: str = "") -> Family:
    return Family(name=name, marks=marks, rules=_RULES, variants=versions, paired=paired)


WAN_FAMILIES = (
    _family("Wan 2.1 VACE", NameMark(names=r"^vace_(?:blocks|patch_embedding)")),
    _family("Wan 2.2 Animate", NameMark(names=r"^(?:face_adapter|motion_encoder|face_encoder|pose_patch_embedding)")),
    _family("Wan 2.2", NameMark(names=_INNER, inputs=frozenset({3072}))),
    _family(
        "Wan 2.1 I2V",
        NameMark(
            names=r"^blocks_\d+_(?:cross_attn_(?:norm_)?[kv]_img|attn2_add_[kv]_proj)|^img_emb|embedder_image_embedder"
        ),
    ),
    _family("Wan 2.1", NameMark(names=_INNER, inputs=frozenset({1536}))),
    _family(
        "Wan 2.1 or 2.2",
        NameMark(names=r"^blocks_\d+_(?:(?:self|cross)_attn_[qkvo]\.|attn[12]_to_|ffn_|(?:self|cross)_attn_norm_)"),
        versions=_VERSIONS,
        paired="Wan 2.2",
    ),
)
"""The families, rarer marks first. The 14-billion models of 2.1 and 2.2 have the same names and sizes.

2.2 has two of them. musubi-tuner writes "wan2.1" into the headers of LoRAs of either."""
