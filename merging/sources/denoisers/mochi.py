"""Mochi 1."""

from __future__ import annotations

from collections.abc import Iterator

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["MOCHI"]


def _blocks() -> Iterator[NameRule]:
    """Yield the rules of both streams of a block: ``x`` is the video's, and ``y`` the text's."""
    for stream, added, q, out, feed_forward, norm in (
        ("x", "", "to_{}", "to_out.0", "ff", "norm1"),
        ("y", "added_", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
    ):
        published, diffusers = "blocks.{}", "transformer_blocks.{}"
        yield from block_rules(
            published,
            diffusers,
            {
                f"attn.qkv_{stream}": " ".join(f"attn1.{q.format(part)}" for part in "qkv"),
                f"attn.proj_{stream}": f"attn1.{out}",
                f"attn.q_norm_{stream}": f"attn1.norm_{added}q",
                f"attn.k_norm_{stream}": f"attn1.norm_{added}k",
                f"mlp_{stream}.w2": f"{feed_forward}.net.2",
                f"mod_{stream}": f"{norm}.linear",
            },
        )
        yield NameRule(
            published=f"{published}.mlp_{stream}.w1", diffusers=(f"{diffusers}.{feed_forward}.net.0.proj",), gated=True
        )


_EMBEDDERS = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    **{f"t5_y_embedder.{part}": f"time_embed.pooler.{part}" for part in ("to_kv", "to_q", "to_out")},
    "t5_yproj": "time_embed.caption_proj",
    "pos_frequencies": "pos_frequencies",
}

MOCHI = Family(
    name="Mochi 1",
    marks=(
        NameMark(names=r"^blocks_\d+_(?:attn_(?:qkv|proj)_[xy]|mlp_[xy]_|mod_[xy])"),
        NameMark(
            names=r"^transformer_blocks_\d+_attn1_(?:add_[qkv]_proj|to_add_out|norm_added)|^time_embed_(?:pooler|caption)"
        ),
    ),
    rules=(
        *_blocks(),
        *(NameRule(published=published, diffusers=(diffusers,)) for published, diffusers in _EMBEDDERS.items()),
        NameRule(published="final_layer.linear", diffusers=("proj_out",)),
        NameRule(published="final_layer.mod", diffusers=("norm_out.linear",), swapped=True),
    ),
)
