"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Iterator

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules
from merging.sources.denoisers.flux import LAST

__all__ = ["SD3"]


def _joint_blocks() -> Iterator[NameRule]:
    """Yield the rules of both streams of a block; the context's stream of the last block only scales and shifts."""
    for theirs, added, q, out, feed_forward, norm in (
        ("x_block", "", "to_{}", "to_out.0", "ff", "norm1"),
        ("context_block", "added_", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
    ):
        stream, block = f"joint_blocks.{{}}.{theirs}", "transformer_blocks.{}"
        yield from block_rules(
            stream,
            block,
            {
                "attn.qkv": " ".join(f"attn.{q.format(part)}" for part in "qkv"),
                "attn.proj": f"attn.{out}",
                "attn.ln_q.weight": f"attn.norm_{added}q.weight",
                "attn.ln_k.weight": f"attn.norm_{added}k.weight",
                "mlp.fc1": f"{feed_forward}.net.0.proj",
                "mlp.fc2": f"{feed_forward}.net.2",
            },
        )
        yield NameRule(published=f"{stream}.adaLN_modulation.1", diffusers=(f"{block}.{norm}.linear",), swapped=True)


SD3 = Family(
    name="Stable Diffusion 3",
    marks=(
        NameMark(names=r"^joint_blocks_\d+_"),
        NameMark(names=r"^pos_embed", also=r"^time_text_embed"),
        # Flux.1 and Qwen-Image have such names too, and other widths than the 1536 and 2432 of 3.5.
        NameMark(names=r"^transformer_blocks_\d+_attn_(?:to_[qkv]|add_[qkv]_proj)\.", inputs=frozenset({1536, 2432})),
    ),
    rules=(
        *_joint_blocks(),
        *block_rules(
            "joint_blocks.{}.x_block",
            "transformer_blocks.{}",
            {
                "attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
                "attn2.proj": "attn2.to_out.0",
                "attn2.ln_q.weight": "attn2.norm_q.weight",
                "attn2.ln_k.weight": "attn2.norm_k.weight",
            },
        ),
        NameRule(published="pos_embed", diffusers=("pos_embed.pos_embed",)),
        NameRule(published="x_embedder.proj", diffusers=("pos_embed.proj",)),
        NameRule(published="context_embedder", diffusers=("context_embedder",)),
        *(
            NameRule(published=f"{theirs}.mlp.{place}", diffusers=(f"time_text_embed.{ours}.linear_{number}",))
            for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for number, place in ((1, 0), (2, 2))
        ),
        *LAST,
    ),
    variants=(("3.5", "Stable Diffusion 3.5"), ("3-5", "Stable Diffusion 3.5")),
)
