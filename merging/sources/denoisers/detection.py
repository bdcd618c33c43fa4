"""A test whether names belong to a diffusion model's denoiser, and not to a language model."""

from __future__ import annotations

import re

__all__ = ["is_denoiser"]

_PARTS = (
    r"to_(?:q|k|v|q_t|k_t|v_t|out|add_out|qkv\w*)",
    r"add_[qkv]_proj",
    r"(?:img|txt)_(?:in|mod|mlp|attn)\w*",
    r"ada_?ln\w*",
    r"(?:\w+_)?transformer_blocks",
    r"(?:double|single|joint)(?:_stream)?_blocks",
    r"(?:noise|context)_refiner",
    r"(?:input|output|down|up)_blocks",
    r"mid(?:dle)?_block",
    r"attn[12]",
    r"distilled_guidance_layer",
    r"(?:qkv|proj)_[xy]",
)
_MARK = re.compile(
    rf"(?:^|\.)(?:{'|'.join(_PARTS)})(?:\.|$)"
    r"|(?:^|\.)blocks\.\d+\.(?:(?:self|cross)_attn\.(?:[qkvo]|[kv]_img|[qkv]_proj|output_proj)|ffn\.(?:[02]|net\.\d.*))$"
    # language models of these names have no such prefix
    r"|^transformer\.layers\.\d+\.(?:attention\.(?:qkv|out)|feed_forward\.w[123])$",
    re.IGNORECASE,
)


def is_denoiser(module: str) -> bool:
    """Whether only denoisers have a module with this dotted name."""
    return bool(_MARK.search(module))
