"""Z-Image."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, block_rules

__all__ = ["Z_IMAGE"]

Z_IMAGE = Family(
    name="Z-Image",
    marks=(NameMark(names=r"^(?:layers|(?:noise|context)_refiner)_\d+_(?:attention_to_|adaLN_modulation_0\.)"),),
    rules=tuple(
        rule
        for stack in ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
        for rule in block_rules(
            stack,
            stack,
            {
                "attention.qkv": "attention.to_q attention.to_k attention.to_v",
                "attention.out": "attention.to_out.0",
                **{
                    part: part
                    for part in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
                },
            },
        )
    ),
)
