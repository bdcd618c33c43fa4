"""Layouts of diffusion models with numbered blocks that people know by short names: U-Nets, and Flux and its kin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

__all__ = ["Layout", "find_layout", "flux_block", "is_autoencoder", "is_text_encoder", "unet_block"]

Layout = Literal["", "sd1", "sdxl", "unet", "flux", "mmdit"]
"""A layout of blocks.

``sd1``: the U-Net of Stable Diffusion 1 and 2, with 12 blocks down and 12 up. ``sdxl``: SDXL's, with 9 and 9. ``unet``:
one of the two, and the names do not show which. ``flux``: the 19 double and 38 single blocks of Flux.1. ``mmdit``:
other numbers of these. "": any other model.
"""

_TEXT = re.compile(
    r"(?:^|\.)(?:lora_te\d?_|lora_text_encoder_|text_encoder(?:_\d)?\.|cond_stage_model\.|conditioner\.|text_encoders\.)"
)
_AUTOENCODER = re.compile(r"(?:^|\.)(?:first_stage_model|vae)\.")

_LEVELS = re.compile(r"(?:^|[._])(down|up)_blocks[._](\d+)[._](resnets|attentions|downsamplers|upsamplers)[._](\d+)")
_NUMBERED = re.compile(r"(?:^|[._])(input|output)_blocks[._](\d+)[._]")
_MIDDLE = re.compile(r"(?:^|[._])mid(?:dle)?_block[._]")
_FRONT = re.compile(r"(?:^|[._])(?:conv_in|time_embed(?:ding)?|label_emb|add_embedding)[._]")
_BACK = re.compile(r"(?:^|[._])(?:conv_norm_out|conv_out|out[._][02])[._]")

_IN_DENOISERS = (
    "single_blocks", "single_transformer_blocks", "double_blocks", "put_blocks", "down_blocks", "up_blocks",
    "mid_block", "middle_block",
)  # fmt: skip
"""Parts of names, one in each denoiser with a layout: a text of many names is searched faster than every name."""

_SINGLE = re.compile(r"(?:^|[._])single_(?:transformer_)?blocks[._](\d+)")
_DOUBLE = re.compile(r"(?:^|[._])(?:double_blocks|(?<!single_)transformer_blocks)[._](\d+)")

_ATTENTION = re.compile(r"[._](?:attentions|transformer_blocks)[._]")
_DEEPER_ATTENTION = re.compile(r"[._]transformer_blocks[._][1-9]")
_SDXL_PARTS = re.compile(r"(?:^|[._])(?:label_emb|add_embedding|lora_te2)[._]|(?:^|\.)(?:text_encoder_2|conditioner)\.")

# Modules of Flux.2, whose modulations are in common, and of HunyuanVideo.
_NOT_FLUX_1 = re.compile(
    r"_stream_modulation|to_qkv_mlp_proj|individual_token_refiner"
    r"|double_blocks\.\d+\.(?:img|txt)_attn_|(?:img|txt)_(?:mlp_fc[12]|mod_linear)"
)


def is_text_encoder(name: str) -> bool:
    """Return whether a name is of a text encoder in a pipeline, a single file, or a LoRA of a diffusion model."""
    return bool(_TEXT.search(name))


def is_autoencoder(name: str) -> bool:
    """Return whether a name is of the autoencoder of a pipeline or a single file."""
    return bool(_AUTOENCODER.search(name))


def unet_block(name: str) -> tuple[str, int] | None:
    """Return the block of a U-Net's tensor: ``("IN", 4)``, ``("M", 0)`` or ``("OUT", 3)``; -1 is the last block up.

    The name may be dotted or flat, and as published or as in diffusers. As in SuperMerger, embeddings of times and
    labels are in the first block, and the output layer in the last.
    """
    if found := _NUMBERED.search(name):
        return ("IN" if found[1] == "input" else "OUT"), int(found[2])
    if found := _LEVELS.search(name):
        level, number = int(found[2]), int(found[4])
        if found[1] == "down":
            return "IN", 3 * level + (3 if found[3] == "downsamplers" else number + 1)
        return "OUT", 3 * level + (2 if found[3] == "upsamplers" else number)
    if _MIDDLE.search(name):
        return "M", 0
    if _FRONT.search(name):
        return "IN", 0
    return ("OUT", -1) if _BACK.search(name) else None


def flux_block(name: str) -> tuple[str, int] | None:
    """Return the block of a tensor of Flux and its kin: ``("D", 4)`` of the double blocks, ``("S", 4)`` of the others.

    The name may be dotted or flat, and as published or as in diffusers.
    """
    if found := _SINGLE.search(name):
        return "S", int(found[1])
    found = _DOUBLE.search(name)
    return ("D", int(found[1])) if found else None


def find_layout(names: Sequence[str], complete: bool) -> Layout:
    """Return the layout of a whole model (``complete``), or of an adapter, whose names may show a part of it."""
    text = "\n".join(names)
    if not any(part in text for part in _IN_DENOISERS):
        return ""
    denoiser = [name for name in names if not is_text_encoder(name) and not is_autoencoder(name)]
    if any(
        "single_blocks" in name or "single_transformer_blocks" in name or "double_blocks" in name for name in denoiser
    ):
        return _find_flux(denoiser, complete)
    if any(_NUMBERED.search(name) or _LEVELS.search(name) or _MIDDLE.search(name) for name in denoiser):
        return _find_unet(denoiser, any(map(_SDXL_PARTS.search, names)), complete)
    return ""


def _find_flux(names: Sequence[str], complete: bool) -> Layout:
    last = {"D": -1, "S": -1}
    for kind, number in filter(None, map(flux_block, names)):
        last[kind] = max(last[kind], number)
    fits = last == {"D": 18, "S": 37} if complete else last["D"] <= 18 and last["S"] <= 37
    return "flux" if fits and not any(map(_NOT_FLUX_1.search, names)) else "mmdit"


def _find_unet(names: Sequence[str], sdxl: bool, complete: bool) -> Layout:
    """Return the kind of U-Net, by its number of blocks, or by the blocks with attentions."""
    sd1, last = False, 0
    for name in names:
        kind, number = unet_block(name) or ("", 0)
        last = max(last, number)
        attends = bool(_ATTENTION.search(name))
        sd1 |= attends and ((kind == "IN" and number in (1, 2)) or (kind == "OUT" and number > 5))
        sdxl |= attends and ((kind == "OUT" and number in (0, 1, 2)) or bool(_DEEPER_ATTENTION.search(name)))
    if last > 8 or (sd1 and not sdxl):
        return "sd1"
    return "sdxl" if (sdxl and not sd1) or (complete and last == 8) else "unet"
