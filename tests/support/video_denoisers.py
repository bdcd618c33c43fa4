"""Tiny denoisers of the video families, LoRA files of them as trainers write these, and the results of diffusers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import lora_pipeline, single_file_utils
from safetensors.torch import load_file, save_file
from torch import nn

from support.denoisers import write_lora
from support.diffusion_models import Shape, State, quietly
from support.image_denoisers import as_published

__all__ = [
    "FORMS",
    "VIDEO_FAMILIES",
    "VideoFamily",
    "bases",
    "build_video_denoiser",
    "fused_by_diffusers",
    "write_form",
]


@dataclass(frozen=True, kw_only=True)
class VideoFamily:
    """A family: diffusers' model and loader of LoRAs, the settings of a tiny model, and the converter of its files.

    ``prefix`` is before the names of published files, and ``widths`` are the real sizes of modules that the converter
    cuts at fixed places; ``converted`` are settings that it takes for granted. ``unnamed`` is a pattern of diffusers'
    names without a known published name.
    """

    name: str
    model: str
    loader: str
    settings: Mapping[str, Any]
    convert: Callable[..., State] | None = None
    prefix: str = ""
    unnamed: str = "$^"
    widths: Mapping[str, Shape] = field(default_factory=dict)
    converted: Mapping[str, Any] = field(default_factory=dict)


class _Kept(dict[str, torch.Tensor]):
    """A state that stays as it is, since diffusers' converter of Cosmos looks into it after it has emptied it."""

    def pop(self, name: str, *_: object) -> torch.Tensor:  # type: ignore[override]
        return self[name]


def _cosmos(state: State) -> State:
    return single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers(_Kept(state))


def _mochi(state: State) -> State:
    """Convert the model with the modulation of the last block, whose name in diffusers the published one hides."""
    last = {f"blocks.47.mod_y.{leaf}": torch.zeros(1) for leaf in ("weight", "bias")}
    made = single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers({**state, **last})
    return {name: value for name, value in made.items() if "norm1_context.linear_1." not in name}


_HEADS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4}
_WAN = {**_HEADS, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16, "freq_dim": 16}
_HUNYUAN = {**_HEADS, "text_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "num_refiner_layers": 2}
_LTX = {**_HEADS, "cross_attention_dim": 16, "caption_channels": 12}
_COSMOS = {**_HEADS, "attention_head_dim": 16, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 4, 4)}
_convert_wan = single_file_utils.convert_wan_transformer_to_diffusers

VIDEO_FAMILIES = {
    "wan": VideoFamily(
        name="Wan 2.1 or 2.2", model="WanTransformer3DModel", loader="Wan", settings=_WAN, convert=_convert_wan
    ),
    "wan-i2v": VideoFamily(
        name="Wan 2.1 I2V",
        model="WanTransformer3DModel",
        loader="Wan",
        settings={**_WAN, "image_dim": 8, "added_kv_proj_dim": 24},
        convert=_convert_wan,
    ),
    "wan-vace": VideoFamily(
        name="Wan 2.1 VACE",
        model="WanVACETransformer3DModel",
        loader="Wan",
        settings={**_WAN, "vace_layers": [0, 1], "vace_in_channels": 8},
        convert=_convert_wan,
    ),
    "hunyuan-video": VideoFamily(
        name="HunyuanVideo",
        model="HunyuanVideoTransformer3DModel",
        loader="HunyuanVideo",
        settings={**_HUNYUAN, "num_single_layers": 1, "pooled_projection_dim": 8},
        convert=single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
        widths={
            **{f"single_transformer_blocks.0.attn.to_{part}": (3072, 3072) for part in "qkv"},
            "single_transformer_blocks.0.proj_mlp": (64, 3072),
        },
    ),
    "hunyuan-video-1.5": VideoFamily(
        name="HunyuanVideo 1.5",
        model="HunyuanVideo15Transformer3DModel",
        loader="",
        settings={**_HUNYUAN, "text_embed_2_dim": 8, "image_embed_dim": 6},
    ),
    "ltx": VideoFamily(
        name="LTX-Video",
        model="LTXVideoTransformer3DModel",
        loader="LTXVideo",
        settings=_LTX,
        convert=single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
    ),
    "ltx2": VideoFamily(
        name="LTX-2",
        model="LTX2VideoTransformer3DModel",
        loader="LTX2",
        settings={
            **_LTX,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
        },
        convert=single_file_utils.convert_ltx2_transformer_to_diffusers,
    ),
    "cosmos-predict1": VideoFamily(
        name="Cosmos Predict 1",
        model="CosmosTransformer3DModel",
        loader="Cosmos",
        settings={**_COSMOS, "extra_pos_embed_type": "learnable"},
        convert=_cosmos,
        prefix="net.",
    ),
    "cosmos-predict2": VideoFamily(
        name="Cosmos Predict 2 or Anima",
        model="CosmosTransformer3DModel",
        loader="Cosmos",
        settings={**_COSMOS, "extra_pos_embed_type": None},
        convert=_cosmos,
        prefix="net.",
    ),
    "mochi": VideoFamily(
        name="Mochi 1",
        model="MochiTransformer3DModel",
        loader="Mochi1",
        settings={**_HEADS, "pooled_projection_dim": 8, "text_embed_dim": 12, "time_embed_dim": 8},
        convert=_mochi,
        converted={"num_layers": 48},
        unnamed=r"norm1_context\.linear_1\.",
    ),
    "cogvideox": VideoFamily(
        name="CogVideoX",
        model="CogVideoXTransformer3DModel",
        loader="CogVideoX",
        settings={
            **_HEADS,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": 4,
        },
    ),
}


def build_video_denoiser(family: str, **settings: Any) -> nn.Module:
    """The tiny denoiser of a family, always with the same weights; with more ``settings``, if there are any."""
    stated = VIDEO_FAMILIES[family]
    torch.manual_seed(0)
    with quietly():
        made: nn.Module = getattr(diffusers, stated.model)(**{**stated.settings, **settings})
        return made


def bases(family: str, folder: Path) -> tuple[Path, Path]:
    """The tiny model in two layouts: a folder as diffusers saves it, in shards, and one file as published."""
    model = build_video_denoiser(family)
    model.save_pretrained(folder / "transformer", max_shard_size="20KB")  # type: ignore[operator]
    published = as_published(model.state_dict())
    prefix = VIDEO_FAMILIES[family].prefix
    save_file({prefix + name: value.contiguous() for name, value in published.items()}, folder / "model.safetensors")
    return folder / "transformer", folder / "model.safetensors"


@dataclass(frozen=True)
class _Form:
    """The names of a LoRA's file: prefix, factors, the set of names, flat or not, and whether it states alphas."""

    prefix: str
    leaves: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    style: str = "published"
    flat: bool = False
    alpha: float | None = None


_DOWN, _DEFAULT = ("lora_down.weight", "lora_up.weight"), ("lora_A.default.weight", "lora_B.default.weight")

FORMS = {
    "diffusion-pipe": _Form("diffusion_model."),
    "lightx2v": _Form("diffusion_model.", _DOWN, alpha=1.0),
    "musubi-tuner": _Form("lora_unet_", _DOWN, flat=True, alpha=1.0),
    "DiffSynth": _Form("", _DEFAULT),
    "DiffSynth, whole pipeline": _Form("pipe.dit.", _DEFAULT),
    "NVIDIA": _Form("net."),
    "diffusers": _Form("transformer.", style="diffusers"),
    "raw PEFT": _Form("base_model.model.", style="diffusers"),
    "OneTrainer": _Form("transformer.", _DOWN, "diffusers", alpha=1.0),
    "FramePack by musubi-tuner": _Form("lora_unet_", _DOWN, "diffusers", flat=True, alpha=1.0),
    "SimpleTuner's LyCORIS": _Form("lycoris_", _DOWN, "diffusers", flat=True, alpha=1.0),
}
"""The forms in which trainers write LoRAs of these families; each trainer writes those of some families only."""


def write_form(path: Path, family: str, form: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Write a LoRA of all linear layers in a form, and return its changes by the names of that form's style."""
    stated = FORMS[form]
    state = build_video_denoiser(family).state_dict()
    named = as_published(state) if stated.style == "published" else state
    modules: dict[str, Shape] = {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in named.items()
        if name.endswith(".weight") and value.dim() == 2 and not re.search(VIDEO_FAMILIES[family].unnamed, name)
    }

    def spell(module: str, part: str) -> str:
        stem = stated.prefix + (module.replace(".", "_") if stated.flat else module)
        return f"{stem}.{dict(zip(('down', 'up', 'alpha'), (*stated.leaves, 'alpha'), strict=True))[part]}"

    tensors = load_file(write_lora(path, modules, spell, alpha=stated.alpha, seed=seed))
    scale = 1.0 if stated.alpha is None else stated.alpha / 2
    return {
        f"{module}.weight": scale * (tensors[spell(module, "up")] @ tensors[spell(module, "down")])
        for module in modules
    }


def fused_by_diffusers(family: str, lora: Path) -> State:
    """The tiny model's weights when diffusers' loader has read a LoRA's file, and fused it."""
    model = build_video_denoiser(family)
    loader = getattr(lora_pipeline, f"{VIDEO_FAMILIES[family].loader}LoraLoaderMixin")
    with quietly(), contextlib.suppress(ImportError):
        state, metadata = loader.lora_state_dict(str(lora), return_lora_metadata=True)
        loader.load_lora_into_transformer(state, transformer=model, metadata=metadata, low_cpu_mem_usage=False)
        model.fuse_lora()  # type: ignore[operator]
    return {
        name.replace(".base_layer.", "."): value.detach()
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }
