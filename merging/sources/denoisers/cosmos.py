"""Cosmos: Predict 1 (published as Cosmos 1.0), Predict 2, and Anima, which has the blocks of Predict 2."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["COSMOS_FAMILIES"]

_LAST = {
    "final_layer.linear": "proj_out",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "x_embedder.proj.1": "patch_embed.proj",
}


def _rules(names: dict[str, str]) -> tuple[NameRule, ...]:
    return tuple(NameRule(published=published, diffusers=(diffusers,)) for published, diffusers in names.items())


_PREDICT1 = (
    *block_rules(
        "blocks.block{}.blocks",
        "transformer_blocks.{}",
        {
            **{
                f"{number}.block.attn.{part}": f"attn{number + 1}.{name}"
                for number in range(2)
                for part, name in (
                    *((f"to_{each}.0", f"to_{each}") for each in "qkv"),
                    *((f"to_{each}.1", f"norm_{each}") for each in "qk"),
                    ("to_out.0", "to_out.0"),
                )
            },
            "2.block.layer1": "ff.net.0.proj",
            "2.block.layer2": "ff.net.2",
            **{
                f"{number}.adaLN_modulation.{layer}": f"norm{number + 1}.linear_{layer}"
                for number in range(3)
                for layer in (1, 2)
            },
        },
    ),
    *_rules(
        {
            **_LAST,
            "affline_norm": "time_embed.norm",
            **{f"extra_pos_embedder.pos_emb_{axis}": f"learnable_pos_embed.pos_emb_{axis}" for axis in "thw"},
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.adaLN_modulation.2": "norm_out.linear_2",
        }
    ),
)
_PREDICT2 = (
    *block_rules(
        "blocks.{}",
        "transformer_blocks.{}",
        {
            **{
                f"{theirs}_attn.{part}": f"{ours}.{name}"
                for theirs, ours in (("self", "attn1"), ("cross", "attn2"))
                for part, name in (
                    *((f"{each}_proj", f"to_{each}") for each in "qkv"),
                    *((f"{each}_norm", f"norm_{each}") for each in "qk"),
                    ("output_proj", "to_out.0"),
                )
            },
            "mlp.layer1": "ff.net.0.proj",
            "mlp.layer2": "ff.net.2",
            **{
                f"adaln_modulation_{part}.{layer}": f"norm{number}.linear_{layer}"
                for number, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
                for layer in (1, 2)
            },
        },
    ),
    *_rules(
        {
            **_LAST,
            "t_embedding_norm": "time_embed.norm",
            "final_layer.adaln_modulation.1": "norm_out.linear_1",
            "final_layer.adaln_modulation.2": "norm_out.linear_2",
        }
    ),
)

COSMOS_FAMILIES = (
    Family(
        name="Cosmos Predict 1",
        marks=(NameMark(names=r"^blocks_block\d+_|^(?:extra_pos_embedder|learnable_pos_embed)_"),),
        rules=_PREDICT1,
    ),
    Family(name="Anima", marks=(NameMark(names=r"^llm_adapter_"),), rules=_PREDICT2),
    Family(
        name="Cosmos Predict 2 or Anima",
        marks=(
            NameMark(
                names=r"^blocks_\d+_(?:(?:self|cross)_attn_(?:[qkv]|output)_proj|mlp_layer[12]|adaln_modulation_)"
            ),
            NameMark(names=r"^transformer_blocks_\d+_norm[123]_linear_[12]\.|^time_embed_t_embedder_"),
            NameMark(names=r"^transformer_blocks_\d+_attn2_to_[kv]\.weight", inputs=frozenset({1024})),
        ),
        rules=_PREDICT2,
    ),
)
"""The families, rarer marks first. LoRAs of Predict 2 and of Anima have the same names and sizes."""
