"""Lumina 2, with fewer keys and values than queries."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["LUMINA2"]

_STACKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")

LUMINA2 = Family(
    name="Lumina 2",
    marks=(
        NameMark(
            names=r"^(?:layers|(?:noise|context)_refiner)_\d+_(?:attn_to_|adaLN_modulation_1\.|feed_forward_linear_)"
        ),
    ),
    rules=(
        *(
            NameRule(
                published=f"{stack}.attention.qkv",
                diffusers=tuple(f"{stack}.attn.to_{part}" for part in "qkv"),
                grouped=True,
            )
            for stack in _STACKS
        ),
        *(
            rule
            for stack in _STACKS
            for rule in block_rules(
                stack,
                stack,
                {
                    "attention.out": "attn.to_out.0",
                    "adaLN_modulation.1": "norm1.linear",
                    **{f"feed_forward.w{number}": f"feed_forward.linear_{number}" for number in (1, 2, 3)},
                },
            )
        ),
    ),
)
