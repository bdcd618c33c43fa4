"""Stable Diffusion 1, 2 and XL. Arithmetic converts the names of their U-Nets: :mod:`merging.sources.unet_names`."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark

__all__ = ["UNETS"]

_CONTEXT = r"_blocks?_.*_attn2_to_[kv]\."
_INNER = r"(?:attentions_\d+|(?:input|output)_blocks_\d+_\d+|middle_block_1)_transformer_blocks_"

UNETS = (
    Family(
        name="Stable Diffusion XL",
        marks=(
            NameMark(names=_CONTEXT, inputs=frozenset({2048})),
            NameMark(names=rf"^\w*{_INNER}[1-9]"),
            NameMark(names=r"^(?:add_embedding|label_emb)_", also=_INNER),
        ),
    ),
    Family(name="Stable Diffusion 1", marks=(NameMark(names=_CONTEXT, inputs=frozenset({768})),)),
    Family(name="Stable Diffusion 2", marks=(NameMark(names=_CONTEXT, inputs=frozenset({1024})),)),
    Family(
        name="Stable Diffusion",
        marks=(NameMark(names=rf"^\w*{_INNER}"), NameMark(names=r"^(?:(?:in|out)put_blocks_\d+|middle_block)_\d+_")),
    ),
)
"""The last stands for files that do not show the version."""
