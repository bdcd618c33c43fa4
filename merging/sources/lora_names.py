"""The normal form of names in LoRA files of diffusion models: a component, and a tensor's name without dots.

Files put different prefixes before the same module, write dots as underscores, or wrap names once more. Underscores
cannot be turned back into dots, so all names are compared without dots."""

from __future__ import annotations

import re

from merging.sources.denoisers import flat_name, respell

__all__ = ["flat_parts", "normal_name", "split_component", "within"]

_FLAT = (
    (re.compile(r"(?:lora_(?:unet|transformer|prior|prior_unet)|lycoris|oft_unet|Hunyuan_video_I2V_lora)_+(?!unet_)"),
     "denoiser"),
    (re.compile(r"(?:lora_te1?|oft_te1?|lora_text_encoder)_+"), "text_encoder"),
    (re.compile(r"(?:lora|oft)_te2_+"), "text_encoder_2"),
    (re.compile(r"(?:lora|oft)_te3_+"), "text_encoder_3"),
)  # fmt: skip
"""Prefixes of flat names in Kohya's and similar files."""

_DOTTED = {
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "net.": "denoiser",
    "pipe.dit.": "denoiser",
    "connectors.": "connectors",
    "text_embedding_projection.": "connectors",
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
"""Prefixes of dotted names in the files of diffusers, ComfyUI and similar programs."""

_WRAPPER = "base_model.model."
_TEXT = ("text_model.", "encoder.layers.", "encoder.block.")


def normal_name(target: str) -> tuple[str, str]:
    """Return the component of a target (``denoiser``, ``text_encoder_2``), and its name in the normal form."""
    component, name = split_component(target)
    return component, within(component, name)


def split_component(target: str) -> tuple[str, str]:
    """Return the component of a target, and its name within the component as the file has it.

    A name without a prefix belongs to a denoiser, unless it begins like a text encoder's names.
    """
    if (parts := _split_flat(target)) is not None:
        return parts
    name = target.removeprefix(_WRAPPER)
    for prefix, component in _DOTTED.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix).removeprefix(_WRAPPER)
    return "text_encoder" if name.startswith(_TEXT) else "denoiser", name


def flat_parts(target: str) -> tuple[str, str] | None:
    """Return the component and the normal form of a flat target, None for a name without a flat prefix."""
    parts = _split_flat(target)
    return None if parts is None else (parts[0], within(*parts))


def _split_flat(target: str) -> tuple[str, str] | None:
    module = target.partition(".")[0]
    for pattern, component in _FLAT:
        found = pattern.match(module)
        if found:
            return component, target[found.end() :]
    return None


def within(component: str, name: str) -> str:
    """Return the normal form of a name within its component; only the dot before ``weight`` or ``bias`` is kept.

    Newer versions of transformers have dropped a level of CLIP's names.
    """
    flat = flat_name(name)
    return flat.removeprefix("text_model_") if component.startswith("text_encoder") else respell(flat)
