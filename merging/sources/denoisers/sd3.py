"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Iterator

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules
from merging.sources.denoisers.flux import LAST

__all__ = ["SD3"]


def _joint_blocks() -> Iterator[NameRule]:
    """Yield the rules of both streams of a block; the context's stream of the last block only scales and shifts."""
    for theirs, attention, q, out, feed_forward, norm in (
        ("x_block", "attn", "to_{}", "to_out.0", "ff", "norm1"),
        ("context_block", "attn", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
    ):
        stream, block = f"joint_blocks.{{}}.{theirs}", "transformer_blocks.{}"
        yield from block_rules(
            stream,
            block,
            {
                "attn.qkv": " ".join(f"{attention}.{q.format(part)}" for part in "qkv"),
                "attn.proj": f"{attention}.{out}",
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
    ),
    rules=(
        *_joint_blocks(),
        *block_rules(
            "joint_blocks.{}.x_block",
            "transformer_blocks.{}",
            {"attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v", "attn2.proj": "attn2.to_out.0"},
        ),
        NameRule(published="x_embedder.proj", diffusers=("pos_embed.proj",)),
        NameRule(published="context_embedder", diffusers=("context_embedder",)),
        *(
            NameRule(published=f"{theirs}.mlp.{place}", diffusers=(f"time_text_embed.{ours}.linear_{number}",))
            for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for number, place in ((1, 0), (2, 2))
        ),
        *LAST,
    ),
)
