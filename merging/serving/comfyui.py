"""Rules of ComfyUI, which loads LoRA modules whose names are in the key map that it makes for a model.

Its map (``model_lora_keys_unet``, ``model_lora_keys_clip``) holds the names of the published model of every family, and
for some families the names of diffusers too. A module under another name is lost, with a line in the log.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from merging.errors import MergingError
from merging.serving.denoiser_names import NameLayout, families_of, modules_of, names_not_taken
from merging.serving.rules import BAKE, Program, Rule
from merging.serving.subject import Subject
from merging.sources.lora_headers import component_configs

__all__ = ["COMFYUI"]

_ALL = "A default down"

_TAKEN: dict[str, tuple[NameLayout, ...]] = {
    "": tuple((prefix, style, _ALL) for prefix in ("diffusion_model.", "lora_unet_")
              for style in ("published", "modulation")),
    "Stable Diffusion": (
        *((prefix, style, _ALL) for prefix in ("lora_unet_", "lycoris_") for style in ("diffusers", "own")),
        ("unet.", "diffusers", _ALL), ("", "diffusers", _ALL),
    ),
    "Stable Diffusion 3": tuple((prefix, "diffusers", _ALL)
                                for prefix in ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_")),
    **{family: tuple((prefix, "diffusers", _ALL) for prefix in ("transformer.", "lora_transformer_", "lycoris_"))
       for family in ("Flux", "Flux.2")},
    "HunyuanVideo": (("transformer.", "first", _ALL), ("diffusion_model.", "first", _ALL)),
    "Wan": (("lora_unet__", "published", _ALL),),
    "Mochi": (("", "published", _ALL),),
    "Qwen-Image": (("", "diffusers", _ALL), ("transformer.", "diffusers", _ALL), ("lycoris_", "diffusers", _ALL)),
    "Z-Image": tuple((prefix, "diffusers", _ALL) for prefix in ("diffusion_model.", "transformer.", "lycoris_")),
    "HiDream": (("transformer.", "diffusers", _ALL), ("lycoris_", "diffusers", _ALL)),
}  # fmt: skip
"""The names in its map, by family. The key "" is for names in every family."""

_TEXT = re.compile(
    r"lora_te[12]?_text_model_encoder_layers_\d+_(?:mlp_fc[12]|self_attn_(?:[qkv]|out)_proj)"
    r"|text_encoder(?:_2)?\.text_model\.encoder\.layers\.\d+\.(?:mlp\.fc[12]|self_attn\.(?:[qkv]|out)_proj)"
    r"|lora_te[123]_encoder_block_.*|lora_te[12]_text_projection|text_encoders\..*"
)
_TEXT_ENCODER = re.compile(r"lora_te|text_encoder")

_PARTS = re.compile(
    r"(?:\.|_)lora[._](?:up|down|mid|A|B)(?:\.default)?(?:\.weight)?|\.lora_linear_layer\.(?:up|down)\.weight"
    r"|\.(?:alpha|dora_scale|reshape_weight|diff|diff_b|set_weight|w_norm|b_norm|oft_blocks|rescale)"
    r"|\.hada_[wt][12](?:_[ab])?|\.lokr_(?:[wt][12](?:_[ab])?)|\.[ab][12]\.weight"
)

_MAP = "comfy/lora.py"
_KOHYA = "convert it: merge it with {method=passthrough, format=kohya, base=MODEL}"


def _attention(subject: Subject) -> Iterator[str]:
    """Yield a U-Net's attention under names of diffusers. ComfyUI knows only the other modules by such names."""
    if families_of(modules_of(subject.tensors)) == ["Stable Diffusion"]:
        yield from names_not_taken(_TAKEN, by="all")(subject)


def _others(subject: Subject) -> Iterator[str]:
    if not any(_attention(subject)):
        yield from names_not_taken(_TAKEN, by="all")(subject)


def _text(subject: Subject) -> Iterator[str]:
    for name in subject.tensors:
        module = _PARTS.sub("", name)
        if _TEXT_ENCODER.match(name) and not _TEXT.fullmatch(module):
            yield name


def _parts(subject: Subject) -> Iterator[str]:
    for name in subject.tensors if _is_diffusion(subject) else ():
        found = _PARTS.search(name)
        if found is None or found.end() != len(name):
            yield name


def _alphas(subject: Subject) -> Iterator[str]:
    """Yield alphas in a config that differ from the rank. ComfyUI reads only alphas next to the factors."""
    if not _is_diffusion(subject) or any(name.endswith(".alpha") for name in subject.tensors):
        return
    if subject.config is not None:
        configs = {"adapter_config.json": subject.config}
    else:
        try:
            configs = component_configs(Path(subject.name), subject.metadata)
        except MergingError as error:
            yield str(error)
            return
    for where, config in configs.items():
        rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        patterned = (config.get("alpha_pattern") or {}) != (config.get("rank_pattern") or {})
        if alpha != rank or patterned or config.get("use_rslora"):
            yield f"{where}: lora_alpha = {alpha!r}, r = {rank!r}"


def _is_diffusion(subject: Subject) -> bool:
    return subject.kind == "diffusion adapter" or bool(families_of(modules_of(subject.tensors)))


def _language(subject: Subject) -> Iterator[str]:
    if not _is_diffusion(subject):
        yield f"{subject.name} names no module of a diffusion model"


def _model(subject: Subject) -> Iterator[str]:
    yield subject.name


_FILES = (
    Rule("ignores", "attention of a U-Net under names of diffusers", _attention, _KOHYA, f"{_MAP}, run"),
    Rule("ignores", "modules under names that are not in its map", _others,
         f"name them as the published model does, behind diffusion_model., or {_KOHYA}", f"{_MAP}, run"),
    Rule("ignores", "modules of text encoders under names that are not in its map", _text, _KOHYA, f"{_MAP}, run"),
    Rule("ignores", "tensors of a kind that it does not know", _parts, BAKE, f"{_MAP}, run"),
    Rule("ignores", "alphas in a config: it uses the rank as alpha", _alphas,
         "merge it with {method=passthrough, format=kohya}, which writes them next to the factors",
         "comfy/weight_adapter/lora.py, run"),
    Rule("warns", "modules under names that are in its map for some of the models that have such modules",
         names_not_taken(_TAKEN, by="some"), _KOHYA, f"{_MAP}, run"),
)  # fmt: skip

COMFYUI = Program(
    "comfyui",
    {
        "diffusion adapter": _FILES,
        "adapter": (
            Rule("refuses", "there are no adapters of language models in it", _language, "load it with PEFT",
                 f"{_MAP}, run"),
            *_FILES,
        ),
        "model": (
            Rule("warns", "these rules are about LoRA files: they do not check whether it loads a model", _model,
                 "try it", "comfy/model_detection.py"),
        ),
    },
    {"pipeline": "give it the published model in one file"},
    "ComfyUI 0.8.0",
)  # fmt: skip
