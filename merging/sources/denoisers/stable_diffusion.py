"""Stable Diffusion 1, 2 and XL. Arithmetic converts the names of their U-Nets: :mod:`merging.sources.unet_names`."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark

__all__ = ["UNETS"]

_CONTEXT = r"_blocks?_.*_attn2_to_[kv]\."
_INNER = r"(?:attentions_\d+|(?:input|output)_blocks_\d+_\d+|middle_block_1)_transformer_blocks_"

_TRANSFORMER = (
    *("norm", "proj_in", "proj_out"),
    *(
        f"transformer_blocks.{{}}.{part}"
        for part in (
            *(f"attn{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
            *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
        )
    ),
)
_RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "norm1", "norm2")
_PUBLISHED_RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
_MODULES = (
    *(
        f"{block}.{part}"
        for block in ("down_blocks.{}", "up_blocks.{}", "mid_block")
        for part in (
            *(f"attentions.{{}}.{part}" for part in _TRANSFORMER),
            *(f"resnets.{{}}.{part}" for part in _RESNET),
            *("downsamplers.{}.conv", "upsamplers.{}.conv"),
        )
    ),
    *(
        f"{block}.{part}"
        for block in ("input_blocks.{}.{}", "output_blocks.{}.{}", "middle_block.{}")
        for part in (*_TRANSFORMER, *_PUBLISHED_RESNET, "op", "conv")
    ),
    *("conv_in", "conv_norm_out", "conv_out", "input_blocks.0.0", "out.0", "out.2"),
    *(f"{part}_embedding.linear_{number}" for part in ("time", "add") for number in (1, 2)),
    *("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2"),
)

UNETS = (
    Family(
        name="Stable Diffusion XL",
        marks=(
            NameMark(names=_CONTEXT, inputs=frozenset({2048})),
            NameMark(names=rf"^\w*{_INNER}[1-9]"),
            NameMark(names=r"^(?:add_embedding|label_emb)_", also=_INNER),
        ),
        modules=_MODULES,
    ),
    Family(name="Stable Diffusion 1", marks=(NameMark(names=_CONTEXT, inputs=frozenset({768})),), modules=_MODULES),
    Family(name="Stable Diffusion 2", marks=(NameMark(names=_CONTEXT, inputs=frozenset({1024})),), modules=_MODULES),
    Family(
        name="Stable Diffusion",
        marks=(NameMark(names=rf"^\w*{_INNER}"), NameMark(names=r"^(?:(?:in|out)put_blocks_\d+|middle_block)_\d+_")),
        modules=_MODULES,
    ),
)
"""The last stands for files that do not show the version."""
