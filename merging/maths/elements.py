"""The elements of a block: attention, its queries, keys and values, the MLP, norms, and so on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

__all__ = ["ELEMENTS", "find_parts", "holds_element"]


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|_)(?:{pattern})(?=_)", re.IGNORECASE)


_NORM = r"\w*norm\w*?|ln_\w+?|(?:in|out)_layers_0|ln\d?|\w*_ln"
_MODULATION = r"(?:img_|txt_)?mod|\w*modulation\w*?|norm\d?(?:_context)?_linear|adaln\w*?|scale_shift_table"
_ATTENTION = r"attn\d?|\w*?attn|\w*?attention|enc_dec_attention|selfattention|encdecattention|mixer"
_MLP = (
    r"\w*?mlp|ff(?:_context|_i)?|ffn|feed_?forward|intermediate|fc\d|experts?|block_sparse_moe|densereludense"
    r"|output_dense"
)

ELEMENTS: Mapping[str, str] = {
    "attn": "attention",
    "self_attn": "self-attention",
    "cross_attn": "cross-attention",
    "q": "queries of attention",
    "k": "keys of attention",
    "v": "values of attention",
    "out": "output projection of attention",
    "mlp": "feed-forward network",
    "norm": "norms",
    "mod": "modulations by time and text",
    "conv": "convolutions of U-Nets",
    "emb": "projections of the time embedding in U-Nets",
    "bias": "biases",
}
"""The names of elements, with what they are."""

_PATTERNS = {
    "attn": _words(_ATTENTION),
    "cross_attn": _words(r"attn2|cross_attn|encoder_attn|encdecattention|crossattention"),
    "q": _words(r"to_q|(?:add_)?q_proj|add_q|query|q|q_lin|wq"),
    "k": _words(r"to_k|(?:add_)?k_proj|add_k|key|k|k_lin|k_img|wk"),
    "v": _words(r"to_v|(?:add_)?v_proj|add_v|value|v|v_lin|v_img|wv"),
    "out": _words(r"to_out|to_add_out|out_proj|o_proj|output_proj|proj|o|out|c_proj|out_lin|output_dense|wo"),
    "mlp": _words(_MLP),
    "norm": _words(_NORM),
    "mod": _words(_MODULATION),
    "conv": _words(r"conv\w*?|in_layers_2|out_layers_3|skip_connection|op"),
    "emb": _words(r"time_emb_proj|emb_layers|time_embed(?:ding)?|label_emb|add_embedding"),
}

_OWN = ("attn", "self_attn")
_QKV = _words(r"\w*qkv\w*?|in_proj|c_attn|query_key_value|wqkv|in_proj_(?:weight|bias)")
_SINGLE = re.compile(r"single_(?:transformer_)?blocks_\d+_(linear1|linear2|proj_out|attn_to_qkv_mlp_proj|attn_to_out)_")
_STEM = {"input_blocks_0_0": "conv", "out_0": "norm", "out_2": "conv"}
"""The elements of a U-Net's first and last layers as published."""

_STEM_NAME = re.compile(rf"(?:^|diffusion_model_|unet_)({'|'.join(_STEM)})_(?:weight|bias)_")
_BEHIND_BLOCK = re.compile(r".*(?:blocks?|(?<!in_)(?<!out_)(?<!emb_)layers?|resblocks|attentions|resnets|h)_\d+_(.+)")


@lru_cache(maxsize=1 << 17)
def find_parts(name: str) -> tuple[frozenset[str], ...]:
    """Return the elements of a tensor; for a fused projection, the elements of each part in it."""
    flat = name.replace(".", "_") + "_"
    if single := _SINGLE.search(flat):
        inputs = single[1] in ("linear1", "attn_to_qkv_mlp_proj")
        return (*(frozenset({*_OWN, part}) for part in ("qkv" if inputs else ("out",))), frozenset({"mlp"}))
    inner = found[1] if (found := _BEHIND_BLOCK.match(flat)) else flat
    elements = {element for element in ("norm", "mod", "conv", "emb") if _PATTERNS[element].search(inner)}
    elements |= {_STEM[stem[1]]} if (stem := _STEM_NAME.search(flat)) else set()
    elements -= {"norm"} if "mod" in elements else {"conv"} if "norm" in elements else set()
    elements |= {"bias"} if flat.endswith(("bias_", "_diff_b_")) else set()
    if not _PATTERNS["attn"].search(inner):
        return (frozenset(elements | ({"mlp"} if _PATTERNS["mlp"].search(inner) else set())),)
    elements |= {"attn", "cross_attn" if _PATTERNS["cross_attn"].search(inner) else "self_attn"}
    if elements & {"norm", "mod"}:
        return (frozenset(elements),)
    if _QKV.search(inner):
        return tuple(frozenset({*elements, part}) for part in "qkv")
    part = next((each for each in (*"qkv", "out") if _PATTERNS[each].search(inner)), None)
    return (frozenset(elements | ({part} if part else set())),)


def holds_element(name: str, part: frozenset[str], element: str) -> bool:
    """Return whether a part of a tensor belongs to an element: one of the names, or a piece of the tensor's name."""
    if element in ELEMENTS:
        return element in part
    return element.replace(".", "_").casefold() in name.replace(".", "_").casefold()
