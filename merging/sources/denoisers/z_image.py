"""Z-Image, and Ideogram 4, whose attention is named alike."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["IDEOGRAM4", "Z_IMAGE"]

_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
_STACKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
_QKV = "attention.to_q attention.to_k attention.to_v"

Z_IMAGE = Family(
    name="Z-Image",
    marks=(
        NameMark(names=r"^(?:layers|(?:noise|context)_refiner)_\d+_(?:attention_to_|adaLN_modulation_0\.)"),
        # Lumina 2 has such names too, and fewer keys and values than queries.
        NameMark(names=r"^(?:layers|(?:noise|context)_refiner)_\d+_attention_qkv\.", ratio=3),
        NameMark(names=r"^layers_\d+_(?:attention_out|feed_forward_w[13])\.", inputs=frozenset({3840})),
        NameMark(names=r"^all_(?:x_embedder|final_layer)_2-1"),
    ),
    rules=(
        *(
            rule
            for stack in _STACKS
            for rule in block_rules(
                stack,
                stack,
                {
                    "attention.qkv": _QKV,
                    "attention.out": "attention.to_out.0",
                    "attention.q_norm": "attention.norm_q",
                    "attention.k_norm": "attention.norm_k",
                },
            )
        ),
        NameRule(published="x_embedder", diffusers=("all_x_embedder.2-1",)),
        NameRule(published="final_layer.linear", diffusers=("all_final_layer.2-1.linear",)),
        NameRule(published="final_layer.adaLN_modulation.1", diffusers=("all_final_layer.2-1.adaLN_modulation.1",)),
    ),
    modules=(
        *(f"{stack}.{part}" for stack in _STACKS for part in (*_FEED_FORWARD, *_NORMS, "adaLN_modulation.0")),
        *("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1", "x_pad_token", "cap_pad_token"),
    ),
    variants=(("turbo", "Z-Image Turbo"),),
)

IDEOGRAM4 = Family(
    name="Ideogram 4",
    marks=(
        NameMark(names=r"^layers_\d+_(?:attention_o|adaln_modulation)\."),
        NameMark(names=r"^layers_\d+_attention_(?:qkv|to_[qkv])\.", inputs=frozenset({4608})),
    ),
    rules=block_rules("layers.{}", "layers.{}", {"attention.qkv": _QKV, "attention.o": "attention.to_out.0"}),
    modules=tuple(f"layers.{{}}.{part}" for part in (*_FEED_FORWARD, *_NORMS, "adaln_modulation")),
)
