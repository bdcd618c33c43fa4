"""Tiny denoisers of the families after Flux.1, LoRA files of them as trainers write these, and what diffusers does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.diffusion_models import State, quietly

__all__ = ["FAMILIES", "Shape", "applied_by_diffusers", "build_denoiser", "write_lora"]

Shape = tuple[int, ...]

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "z-image": (
        "ZImageTransformer2DModel",
        "ZImagePipeline",
        {"dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "in_channels": 4,
         "cap_feat_dim": 8, "axes_dims": [2, 2, 4], "axes_lens": [4, 4, 4]},
    ),
    "ernie-image": (
        "ErnieImageTransformer2DModel",
        "ErnieImagePipeline",
        {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 24, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 8, "rope_axes_dim": (2, 2, 4)},
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        "QwenImagePipeline",
        {"in_channels": 4, "out_channels": 1, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4)},
    ),
    "wan": (
        "WanTransformer3DModel",
        "WanPipeline",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_dim": 8,
         "freq_dim": 8, "ffn_dim": 24, "num_layers": 2},
    ),
}  # fmt: skip
"""Each family's model and pipeline in diffusers, and the settings of a tiny one."""


def build_denoiser(family: str) -> nn.Module:
    """The tiny denoiser of a family, always with the same weights."""
    model, _, settings = FAMILIES[family]
    torch.manual_seed(0)
    with quietly():
        made: nn.Module = getattr(diffusers, model)(**settings)
        return made


def applied_by_diffusers(family: str, lora: Path) -> State:
    """The denoiser's weights when diffusers has loaded a LoRA's file and fused it."""
    model, pipeline = build_denoiser(family), getattr(diffusers, FAMILIES[family][1])
    with quietly(), contextlib.suppress(ImportError):
        state, metadata = pipeline.lora_state_dict(str(lora), return_lora_metadata=True)
        pipeline.load_lora_into_transformer(state, model, metadata=metadata, low_cpu_mem_usage=False)
        model.fuse_lora()  # type: ignore[operator]
    return {
        name.replace(".base_layer.", "."): value.detach()
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


def write_lora(
    path: Path,
    modules: Mapping[str, Shape],
    named: Callable[[str, str], str],
    *,
    alpha: float | None = None,
    seed: int = 1,
    rank: int = 2,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A file of random factors, each ``named`` by its module and by ``down``, ``up`` or ``alpha``.

    The same seed gives the same numbers under any names. ``config`` goes into the header as diffusers writes it.
    """
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for module, (outputs, inputs, *_) in modules.items():
        state[named(module, "down")] = 0.3 * torch.randn(rank, inputs, generator=random)
        state[named(module, "up")] = 0.3 * torch.randn(outputs, rank, generator=random)
        if alpha is not None:
            state[named(module, "alpha")] = torch.tensor(float(alpha))
    header = dict(metadata or {})
    if config is not None:
        fields = {f"transformer.{key}": value for key, value in config.items()}
        header["lora_adapter_metadata"] = json.dumps(fields)
    save_file(state, path, header or None)
    return path
