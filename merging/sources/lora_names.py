"""The normal form of names in LoRA files of diffusion models: a component, and the name of a tensor without dots.

Files put prefixes of their own before the same module, write dots as underscores, or wrap names once more; underscores
cannot be turned back into dots, so that all are compared without them.
"""

from __future__ import annotations

import re

__all__ = ["normal_name", "within"]

_FLAT = (
    (re.compile(r"(?:lora_(?:unet|transformer|prior|prior_unet)|lycoris|oft_unet|Hunyuan_video_I2V_lora)_+(?!unet_)"),
     "denoiser"),
    (re.compile(r"(?:lora_te1?|oft_te1?|lora_text_encoder)_+"), "text_encoder"),
    (re.compile(r"(?:lora|oft)_te2_+"), "text_encoder_2"),
    (re.compile(r"(?:lora|oft)_te3_+"), "text_encoder_3"),
)  # fmt: skip
"""What stands before the flat names of Kohya's files and their kin."""

_DOTTED = {
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "transformer.": "denoiser",
    "unet.": "denoiser",
    "transformer_2.": "denoiser_2",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "clip_l.transformer.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_g.transformer.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "t5xxl.transformer.": "text_encoder_3",
}
"""What stands before dotted names in the files of diffusers, ComfyUI and their kin."""

_WRAPPER = "base_model.model."
_TEXT = ("text_model.", "encoder.layers.", "encoder.block.")
_HUNYUAN = (
    (re.compile(r"(?<=_(?:img|txt)_)mlp_fc([12])(?=\.)"), lambda found: f"mlp_{2 * int(found[1]) - 2}"),
    (re.compile(r"^((?:double|single)_blocks_\d+_(?:img_mod|txt_mod|modulation))_linear(?=\.)"), r"\1_lin"),
)
"""Tencent's names, where ComfyUI has others of the same modules."""


def normal_name(target: str) -> tuple[str, str]:
    """The component that a target belongs to (``denoiser``, ``text_encoder_2``), and its name in the normal form.

    A name without a prefix is one of a denoiser, unless it begins as those of text encoders do.
    """
    module = target.partition(".")[0]
    for pattern, component in _FLAT:
        found = pattern.match(module)
        if found:
            return component, within(component, target[found.end() :])
    name = target.removeprefix(_WRAPPER)
    for prefix, component in _DOTTED.items():
        if name.startswith(prefix):
            return component, within(component, name.removeprefix(prefix).removeprefix(_WRAPPER))
    component = "text_encoder" if name.startswith(_TEXT) else "denoiser"
    return component, within(component, name)


def within(component: str, name: str) -> str:
    """The normal form of a name within its component: of its dots only that before ``weight`` or ``bias`` is left.

    Newer versions of transformers have dropped a level of CLIP's names.
    """
    module, _, leaf = name.rpartition(".")
    flat = f"{module.replace('.', '_')}.{leaf}" if leaf in ("weight", "bias") else name.replace(".", "_")
    if component.startswith("text_encoder"):
        return flat.removeprefix("text_model_")
    for pattern, meant in _HUNYUAN:
        flat = pattern.sub(meant, flat)
    return flat
