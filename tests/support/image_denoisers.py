"""Tiny denoisers of the image families of diffusers, as saved by it, and as published in one file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils
from torch import nn

from merging.sources.diffusion_names import known_names
from support.diffusion_models import Shape, State, quietly

__all__ = ["IMAGE_FAMILIES", "ImageFamily", "as_published", "build_image_denoiser", "fused_by_diffusers", "shapes_of"]


@dataclass(frozen=True, kw_only=True)
class ImageFamily:
    """A family: diffusers' classes, the settings of a tiny model, and its converter of published files.

    ``widths`` are the real sizes of modules that the converter cuts at fixed places.
    """

    name: str
    model: str
    pipeline: str
    settings: Mapping[str, Any]
    convert: Callable[..., State] | None = None
    widths: Mapping[str, Shape] = field(default_factory=dict)


def _converter(name: str) -> Callable[..., State] | None:
    """diffusers' converter of this name; versions for Python 3.10 lack some."""
    return getattr(single_file_utils, name, None)


_HEADS = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4}
_FLUX = {**_HEADS, "num_single_layers": 2, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4)}
_WIDE = {
    **{f"single_transformer_blocks.0.attn.to_{part}": (3072, 3072) for part in "qkv"},
    "single_transformer_blocks.0.proj_mlp": (12288, 3072),
}
_FAMILIES = {
    "flux": ImageFamily(
        name="Flux.1",
        model="FluxTransformer2DModel",
        pipeline="FluxPipeline",
        settings={**_FLUX, "num_single_layers": 1, "pooled_projection_dim": 8, "guidance_embeds": True},
        convert=_converter("convert_flux_transformer_checkpoint_to_diffusers"),
        widths=_WIDE,
    ),
    "chroma": ImageFamily(
        name="Chroma",
        model="ChromaTransformer2DModel",
        pipeline="ChromaPipeline",
        settings={
            **_FLUX,
            "num_single_layers": 1,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        convert=_converter("convert_chroma_transformer_checkpoint_to_diffusers"),
        widths=_WIDE,
    ),
    "flux2": ImageFamily(
        name="Flux.2",
        model="Flux2Transformer2DModel",
        pipeline="Flux2Pipeline",
        settings={**_FLUX, "timestep_guidance_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
        convert=_converter("convert_flux2_transformer_checkpoint_to_diffusers"),
    ),
    "flux3": ImageFamily(
        name="Flux.3",
        model="Flux3Transformer2DModel",
        pipeline="Flux3ModularPipeline",
        settings={**_FLUX, "cond_in_channels": 4, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
        convert=_converter("convert_flux3_transformer_checkpoint_to_diffusers"),
    ),
    "sd3": ImageFamily(
        name="Stable Diffusion 3",
        model="SD3Transformer2DModel",
        pipeline="StableDiffusion3Pipeline",
        settings={
            **_HEADS,
            "sample_size": 8,
            "out_channels": 4,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        convert=_converter("convert_sd3_transformer_checkpoint_to_diffusers"),
    ),
    "qwen-image": ImageFamily(
        name="Qwen-Image",
        model="QwenImageTransformer2DModel",
        pipeline="QwenImagePipeline",
        settings={**_HEADS, "out_channels": 1, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4)},
    ),
    "qwen-image-2.1": ImageFamily(
        name="Qwen-Image 2.1",
        model="QwenImage21Transformer2DModel",
        pipeline="QwenImage21Pipeline",
        settings={**_HEADS, "out_channels": 4, "context_in_dim": 8, "axes_dims_rope": (2, 2, 4)},
        convert=_converter("convert_qwen_image21_transformer_checkpoint_to_diffusers"),
    ),
    "z-image": ImageFamily(
        name="Z-Image",
        model="ZImageTransformer2DModel",
        pipeline="ZImagePipeline",
        settings={
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "in_channels": 4,
            "cap_feat_dim": 8,
            "axes_dims": [2, 2, 4],
            "axes_lens": [4, 4, 4],
        },
        convert=_converter("convert_z_image_transformer_checkpoint_to_diffusers"),
    ),
    "lumina2": ImageFamily(
        name="Lumina 2",
        model="Lumina2Transformer2DModel",
        pipeline="Lumina2Pipeline",
        settings={
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (8, 8, 8),
            "cap_feat_dim": 8,
        },
        convert=_converter("convert_lumina2_to_diffusers"),
        widths={
            f"{stack}.0.attn.to_{part}": (rows, 2304)
            for stack in ("layers", "noise_refiner", "context_refiner")
            for part, rows in (("q", 2304), ("k", 768), ("v", 768))
        },
    ),
    "hidream": ImageFamily(
        name="HiDream",
        model="HiDreamImageTransformer2DModel",
        pipeline="HiDreamImagePipeline",
        settings={
            **_HEADS,
            "patch_size": 2,
            "num_single_layers": 1,
            "caption_channels": [8, 8],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1],
        },
        convert=_converter("convert_hidream_transformer_to_diffusers"),
    ),
    "krea2": ImageFamily(
        name="Krea 2",
        model="Krea2Transformer2DModel",
        pipeline="Krea2Pipeline",
        settings={
            **_HEADS,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 12,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (2, 2, 4),
        },
        convert=_converter("convert_krea2_transformer_checkpoint_to_diffusers"),
    ),
    "ideogram4": ImageFamily(
        name="Ideogram 4",
        model="Ideogram4Transformer2DModel",
        pipeline="Ideogram4Pipeline",
        settings={
            **_HEADS,
            "intermediate_size": 24,
            "adaln_dim": 8,
            "llm_features_dim": 12,
            "mrope_section": (2, 1, 1),
        },
    ),
}


IMAGE_FAMILIES = {name: family for name, family in _FAMILIES.items() if hasattr(diffusers, family.model)}


def build_image_denoiser(family: str) -> nn.Module:
    """The tiny denoiser of a family, always with the same weights."""
    stated = IMAGE_FAMILIES[family]
    torch.manual_seed(0)
    with quietly():
        made: nn.Module = getattr(diffusers, stated.model)(**stated.settings)
        return made


def fused_by_diffusers(family: str, lora: Path) -> State:
    """A family's weights when diffusers has loaded a LoRA's file, and fused it."""
    model, pipeline = build_image_denoiser(family), getattr(diffusers, IMAGE_FAMILIES[family].pipeline)
    with quietly(), contextlib.suppress(ImportError):
        state, *others = pipeline.lora_state_dict(str(lora), return_lora_metadata=True)
        load = pipeline.load_lora_into_transformer
        alphas = {"network_alphas": None} if "network_alphas" in signature(load).parameters else {}
        load(state, transformer=model, metadata=others[-1], low_cpu_mem_usage=False, **alphas)
        model.fuse_lora()  # type: ignore[operator]
    return {
        name.replace(".base_layer.", "."): value.detach()
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


def shapes_of(state: State) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state.items()}


def as_published(state: State, style: str = "published") -> State:
    """A denoiser's tensors under their published names, or diffusers', put together of the rows that each is."""
    return {
        known.name: torch.cat([state[part.name][part.start : part.start + part.length] for part in known.rows])
        for known in known_names(shapes_of(state))
        if known.component == "transformer" and style in known.styles
    }
