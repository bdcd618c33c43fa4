"""LoRA files of families of diffusion models, in the forms that trainers write, and how programs read them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders import lora_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["ROWS", "Row", "by_definition", "diffusers_reads", "write"]

D = 8
"""The width of every model here."""

_TO = ("to_q", "to_k", "to_v", "to_out.0")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_WAN = {
    **{f"blocks.0.{attn}.{part}": (D, D) for attn in ("self_attn", "cross_attn") for part in "qkvo"},
    "blocks.0.ffn.0": (2 * D, D),
    "blocks.0.ffn.2": (D, 2 * D),
}
_WAN_IMAGE = {**_WAN, "blocks.0.cross_attn.k_img": (D, D), "blocks.0.cross_attn.v_img": (D, D)}
_WAN_DIFFUSERS = {
    **{f"blocks.0.{attn}.{part}": (D, D) for attn in ("attn1", "attn2") for part in _TO},
    "blocks.0.ffn.net.0.proj": (2 * D, D),
    "blocks.0.ffn.net.2": (D, 2 * D),
}
_QWEN = {
    **{f"transformer_blocks.0.attn.{part}": (D, D) for part in (*_TO, *_ADDED)},
    "transformer_blocks.0.img_mlp.net.0.proj": (2 * D, D),
    "transformer_blocks.0.img_mlp.net.2": (D, 2 * D),
    "transformer_blocks.0.txt_mlp.net.2": (D, 2 * D),
    "transformer_blocks.0.img_mod.1": (6 * D, D),
}
_Z_REST = {
    "layers.0.feed_forward.w1": (2 * D, D),
    "layers.0.adaLN_modulation.0": (4 * D, D),
}
_Z_SPLIT = {
    **{
        f"{block}.attention.{part}": (D, D)
        for block in ("layers.0", "noise_refiner.0", "context_refiner.0")
        for part in _TO
    },
    **_Z_REST,
}
_Z_FUSED = {"layers.0.attention.qkv": (3 * D, D), "layers.0.attention.out": (D, D), **_Z_REST}
_FLUX2 = {
    **{f"double_blocks.0.{part}_attn.qkv": (3 * D, D) for part in ("img", "txt")},
    "double_blocks.0.img_attn.proj": (D, D),
    "double_blocks.0.img_mlp.0": (2 * D, D),
    "double_blocks.0.img_mlp.2": (D, D),
    "single_blocks.0.linear1": (5 * D, D),
    "single_blocks.0.linear2": (D, 2 * D),
    "double_stream_modulation_img.lin": (6 * D, D),
    "single_stream_modulation.lin": (3 * D, D),
}
_FLUX2_DIFFUSERS = {
    **{f"transformer_blocks.0.attn.{part}": (D, D) for part in (*_TO, *_ADDED)},
    "transformer_blocks.0.ff.linear_in": (2 * D, D),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (5 * D, D),
}
_HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (3 * D, D),
    "double_blocks.0.img_attn_proj": (D, D),
    "double_blocks.0.img_mlp.fc1": (4 * D, D),
    "double_blocks.0.img_mod.linear": (6 * D, D),
    "single_blocks.0.linear2": (D, 5 * D),
    "single_blocks.0.modulation.linear": (3 * D, D),
}
_HUNYUAN_COMFYUI = {"double_blocks.0.img_attn.qkv": (3 * D, D), "double_blocks.0.img_mlp.0": (4 * D, D)}
_LTX = {
    **{f"transformer_blocks.0.{attn}.{part}": (D, D) for attn in ("attn1", "attn2") for part in _TO},
    "transformer_blocks.0.ff.net.0.proj": (4 * D, D),
    "transformer_blocks.0.ff.net.2": (D, 4 * D),
}
_LTX2 = {
    **_LTX,
    "transformer_blocks.0.audio_attn1.to_q": (D, D),
    "transformer_blocks.0.audio_to_video_attn.to_q": (D, D),
    "patchify_proj": (D, D),
    "adaln_single.linear": (6 * D, D),
}
_HIDREAM = {
    "double_stream_blocks.0.block.attn1.to_q": (D, D),
    "double_stream_blocks.0.block.attn1.to_q_t": (D, D),
    "double_stream_blocks.0.block.ff_i.experts.1.w1": (2 * D, D),
    "double_stream_blocks.0.block.ff_i.shared_experts.w1": (2 * D, D),
    "single_stream_blocks.0.block.attn1.to_q": (D, D),
    "caption_projection.0.linear": (D, D),
}
_LUMINA2 = {
    "layers.0.attention.qkv": (2 * D, D),
    "layers.0.attention.out": (D, D),
    "layers.0.feed_forward.w1": (2 * D, D),
    "layers.0.adaLN_modulation.1": (4 * D, D),
    "noise_refiner.0.feed_forward.w1": (2 * D, D),
}
_LUMINA2_DIFFUSERS = {"layers.0.attn.to_q": (D, D), "layers.0.feed_forward.linear_1": (2 * D, D)}
_ANIMA = {
    "blocks.0.self_attn.q_proj": (D, D),
    "blocks.0.cross_attn.q_proj": (D, D),
    "blocks.0.mlp.layer1": (2 * D, D),
    "blocks.0.adaln_modulation_self_attn.1": (D, D),
}
_CHROMA = {"double_blocks.0.img_attn.qkv": (3 * D, D), "distilled_guidance_layer.layers.0.in_layer": (D, D)}
_ERNIE = {"layers.0.self_attention.to_k": (D, D), "layers.0.self_attention.to_out.0": (D, D)}


@dataclass(frozen=True)
class Row:
    """A family's modules in one form: what stands before and behind them, and the family's loader in diffusers.

    ``loader`` is empty where diffusers does not read such files, or not at these sizes. ``flat``: dots are underscores.
    ``alphas``: a tensor beside the factors; ``configured``: a config in the header.
    """

    modules: Mapping[str, tuple[int, int]]
    prefix: str
    leaves: tuple[str, str]
    loader: str = ""
    flat: bool = False
    alphas: bool = False
    configured: bool = False


_AB = ("lora_A.weight", "lora_B.weight")
_DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
_DOWN = ("lora_down.weight", "lora_up.weight")


def _row(modules: Mapping[str, tuple[int, int]], prefix: str, loader: str = "", leaves: tuple[str, str] = _AB) -> Row:
    return Row(modules, prefix, leaves, loader and f"{loader}LoraLoaderMixin", alphas=leaves == _DOWN)


def _flat(modules: Mapping[str, tuple[int, int]], prefix: str, loader: str = "") -> Row:
    return Row(modules, prefix, _DOWN, loader and f"{loader}LoraLoaderMixin", flat=True, alphas=True)


def _saved(modules: Mapping[str, tuple[int, int]], loader: str, prefix: str = "transformer.") -> Row:
    return Row(modules, prefix, _AB, f"{loader}LoraLoaderMixin", configured=True)


ROWS = {
    "wan comfyui": _row(_WAN, "diffusion_model.", "Wan"),
    "wan from images": _row(_WAN_IMAGE, "diffusion_model.", "Wan"),
    "wan lightx2v": _row(_WAN, "diffusion_model.", "Wan", _DOWN),
    "wan musubi": _flat(_WAN, "lora_unet_", "Wan"),
    "wan fun": _flat(_WAN, "lora_unet__"),
    "wan diffusers": _saved(_WAN_DIFFUSERS, "Wan"),
    "wan 2.2 second": _row(_WAN_DIFFUSERS, "transformer_2."),
    "wan bare": _row(_WAN, "", "", _DEFAULT),
    "qwen comfyui": _row(_QWEN, "diffusion_model.", "QwenImage"),
    "qwen diffusers": _saved(_QWEN, "QwenImage"),
    "qwen musubi": _flat(_QWEN, "lora_unet_", "QwenImage"),
    "qwen lycoris": _flat(_QWEN, "lycoris_"),
    "qwen diffsynth": _row(_QWEN, "", "QwenImage", _DEFAULT),
    "qwen lightning": _row(_QWEN, "", "QwenImage", _DOWN),
    "z-image diffusers": _saved(_Z_SPLIT, "ZImage"),
    "z-image unconfigured": _row(_Z_SPLIT, "transformer.", "ZImage"),
    "z-image bare": _row(_Z_SPLIT, "", "", _DEFAULT),
    "z-image ai-toolkit": _row(_Z_SPLIT, "diffusion_model.", "ZImage"),
    "z-image native": _row(_Z_FUSED, "diffusion_model.", "ZImage"),
    "z-image musubi": _flat(_Z_SPLIT, "lora_unet_", "ZImage"),
    "flux.2 comfyui": _row(_FLUX2, "diffusion_model.", "Flux2"),
    "flux.2 diffusers": _saved(_FLUX2_DIFFUSERS, "Flux2"),
    "flux.2 flat": _flat(_FLUX2, "lora_unet_", "Flux2"),
    "flux.2 raw": _row(_FLUX2, "base_model.model.", "Flux2"),
    "hunyuan official": _row(_HUNYUAN, "transformer.", "HunyuanVideo"),
    "hunyuan comfyui": _row(_HUNYUAN_COMFYUI, "diffusion_model."),
    "hunyuan i2v": _flat(_HUNYUAN, "Hunyuan_video_I2V_lora_"),
    "ltx comfyui": _row(_LTX, "diffusion_model.", "LTXVideo"),
    "ltx diffusers": _saved(_LTX, "LTXVideo"),
    "ltx-2 comfyui": _row(_LTX2, "diffusion_model.", "LTX2"),
    "ltx-2 connectors": _row({"text_embedding_projection.aggregate_embed": (D, D)}, "", "LTX2"),
    "hidream comfyui": _row(_HIDREAM, "diffusion_model.", "HiDreamImage"),
    "hidream diffusers": _saved(_HIDREAM, "HiDreamImage"),
    "hidream lycoris": _flat(_HIDREAM, "lycoris_"),
    "chroma comfyui": _row(_CHROMA, "diffusion_model."),
    "chroma flat": _flat(_CHROMA, "lora_unet_"),
    "lumina 2 comfyui": _row(_LUMINA2, "diffusion_model."),
    "lumina 2 flat": _flat(_LUMINA2, "lora_unet_"),
    "lumina 2 diffusers": _saved(_LUMINA2_DIFFUSERS, "Lumina2"),
    "anima comfyui": _row(_ANIMA, "diffusion_model.", "Anima"),
    "anima flat": _flat(_ANIMA, "lora_unet_"),
    "ernie diffusers": _saved(_ERNIE, "ErnieImage"),
    "ernie onetrainer": _row(_ERNIE, "transformer.", "", _DOWN),
}
"""Forms of files by family, as programs were seen to read them."""


def write(row: Row, path: Path, seed: int, rank: int, alpha: float | None) -> Path:
    """A file of random factors; ``alpha`` is stated where the form states one."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for module, (outputs, inputs) in row.modules.items():
        stem = row.prefix + (module.replace(".", "_") if row.flat else module)
        state[f"{stem}.{row.leaves[0]}"] = torch.randn(rank, inputs, generator=random)
        state[f"{stem}.{row.leaves[1]}"] = torch.randn(outputs, rank, generator=random)
        if row.alphas and alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(row.modules)}
    component = row.prefix.removesuffix(".")
    stated = json.dumps({f"{component}.{key}": value for key, value in config.items()})
    save_file(state, path, {"lora_adapter_metadata": stated} if row.configured else None)
    return path


def by_definition(path: Path) -> dict[str, Tensor]:
    """What a file changes, by its own names: ComfyUI's reading, for which alpha is the rank where none is stated."""
    state, found = load_file(path), {}
    for name in state:
        for down, up in (_AB, _DEFAULT, _DOWN):
            if name.endswith(f".{down}"):
                stem = name.removesuffix(f".{down}")
                factor = state[f"{stem}.{up}"] @ state[name]
                found[stem] = factor * (
                    float(state[f"{stem}.alpha"]) / len(state[name]) if f"{stem}.alpha" in state else 1
                )
    return found


def diffusers_reads(row: Row, path: Path) -> dict[str, Tensor]:
    """The changes that the family's own loader in diffusers takes of a file, by its names for the modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = getattr(lora_pipeline, row.loader)
        state = loader.lora_state_dict(load_file(path))
        state, alphas = state if isinstance(state, tuple) else (state, {})
    with safe_open(path, "pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    changes: dict[str, Tensor] = {}
    for name, down in state.items():
        stem, found, _ = name.partition(".lora_A.weight")
        if not found:
            continue
        component = stem.partition(".")[0]
        alpha = (alphas or {}).get(f"{stem}.alpha", metadata.get(f"{component}.lora_alpha", len(down)))
        changes[stem] = state[f"{stem}.lora_B.weight"] @ down * (float(alpha) / len(down))
    return changes
