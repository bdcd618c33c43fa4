"""Lumina 2, with fewer keys and values than queries."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["LUMINA2"]

_MODULATED, _CONTEXT = ("layers.{}", "noise_refiner.{}"), "context_refiner.{}"

LUMINA2 = Family(
    name="Lumina 2",
    marks=(
        NameMark(
            names=r"^(?:layers|(?:noise|context)_refiner)_\d+_(?:attn_to_|adaLN_modulation_1\.|feed_forward_linear_)"
        ),
        # Z-Image has such names too, and another width.
        NameMark(names=r"^layers_\d+_(?:attention_(?:qkv|out)|feed_forward_w[13])\.", inputs=frozenset({2304})),
    ),
    rules=(
        *(
            NameRule(
                published=f"{stack}.attention.qkv",
                diffusers=tuple(f"{stack}.attn.to_{part}" for part in "qkv"),
                grouped=True,
            )
            for stack in (*_MODULATED, _CONTEXT)
        ),
        *(
            rule
            for stack in (*_MODULATED, _CONTEXT)
            for rule in block_rules(
                stack,
                stack,
                {
                    "attention.out": "attn.to_out.0",
                    "attention.q_norm": "attn.norm_q",
                    "attention.k_norm": "attn.norm_k",
                    "attention_norm1": "norm1" if stack == _CONTEXT else "norm1.norm",
                    "attention_norm2": "norm2",
                    **{f"feed_forward.w{number}": f"feed_forward.linear_{number}" for number in (1, 2, 3)},
                },
            )
        ),
        *(
            NameRule(published=f"{stack}.adaLN_modulation.1", diffusers=(f"{stack}.norm1.linear",))
            for stack in _MODULATED
        ),
        *(
            NameRule(published=theirs, diffusers=(ours,))
            for theirs, ours in (
                ("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
                ("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
                ("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
                ("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
                ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
                ("final_layer.linear", "norm_out.linear_2"),
            )
        ),
    ),
    modules=("x_embedder", *(f"{stack}.ffn_norm{number}" for stack in (*_MODULATED, _CONTEXT) for number in (1, 2))),
)
