"""What is wrong with LoRA files of diffusion models, and what programs make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.adapters import State
from support.diffusion_models import factors
from support.serving_edits import Edit, with_nan

__all__ = ["FLUX", "LORAS", "UNET", "Expected", "dotted", "kohya", "lora", "under"]

Expected = Mapping[str, tuple[str, str]]
"""What programs say: the severity, and what they do."""


UNET = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


FLUX = "lora_unet_double_blocks_0_img_mlp_0"


def kohya(folder: Path, change: Callable[[State], State] = dict, **metadata: str) -> Path:
    """A LoRA of a U-Net as sd-scripts saves it, and what is done to it."""
    folder.mkdir(exist_ok=True)
    path = factors(folder / "lora.safetensors", {UNET: ((8, 8), 1.0)})
    save_file(change(load_file(path)), path, metadata)
    return path


def lora(change: Callable[[State], State] = dict, **metadata: str) -> Edit:
    return lambda folder: kohya(folder, change, **metadata)


def dotted(state: State) -> State:
    """Factors by diffusers' names, of two ranks."""
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    return {
        f"{module}.{to}.lora_{side}.weight": torch.ones(*((rank, 8) if side == "A" else (8, rank)))
        for to, rank in (("to_q", 2), ("to_k", 3))
        for side in "AB"
    }


def under(module: str) -> Edit:
    """Factors of one module."""
    return lora(lambda _: {f"{module}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"})


LORAS: dict[str, tuple[Edit, Expected]] = {
    "LoHa": (
        lora(lambda _: {f"{UNET}.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}),
        {"diffusers": ("refuses", "only LoRA is loaded")},
    ),
    "LoKr": (
        lora(lambda _: {f"{UNET}.lokr_w1": torch.ones(2, 2), f"{UNET}.lokr_w2": torch.ones(4, 4)}),
        {"diffusers": ("refuses", "only LoRA is loaded")},
    ),
    "LoKr of Flux": (
        lora(lambda _: {f"{FLUX}.lokr_w1": torch.ones(2, 2), f"{FLUX}.lokr_w2": torch.ones(4, 4)}),
        {"diffusers": ("warns", "LoKr and full differences")},
    ),
    "DoRA": (
        lora(lambda s: s | {f"{UNET}.dora_scale": torch.ones(8, 1)}),
        {"diffusers": ("ignores", "DoRA's magnitudes")},
    ),
    "two alphas": (
        lora(lora_adapter_metadata='{"unet.r": 2}'),
        {"diffusers": ("refuses", "there are alphas in the header")},
    ),
    "ranks": (lora(dotted), {"diffusers": ("warns", "before August 2026")}),
    "ComfyUI": (under("diffusion_model.odd.0.to_q"), {"diffusers": ("warns", "names of ComfyUI")}),
    "of Flux or of Flux.2": (
        under("diffusion_model.double_blocks.0.img_mlp.0"),
        {"diffusers": ("warns", "loads for some of the models")},
    ),
    "of Wan, by diffusers": (
        under("transformer.blocks.0.attn1.to_q"),
        {"comfyui": ("ignores", "modules under names that are not in its map")},
    ),
    "of Flux or of HunyuanVideo": (
        under("transformer.transformer_blocks.0.ff.net.0.proj"),
        {"comfyui": ("warns", "in its map for some of the models")},
    ),
    "of Anima, flat": (
        under("lora_unet_blocks_0_mlp_layer1"),
        {"diffusers": ("ignores", "modules under names that it does not load")},
    ),
    "attention of a U-Net": (lora(dotted), {"comfyui": ("ignores", "attention of a U-Net")}),
    "newer text encoder": (
        under("text_encoder.encoder.layers.0.self_attn.q_proj"),
        {"comfyui": ("ignores", "modules of text encoders")},
    ),
    "magnitudes of diffusers": (
        lora(lambda s: s | {f"{UNET}.lora_magnitude_vector": torch.ones(8)}),
        {"comfyui": ("ignores", "tensors of a kind that it does not know")},
    ),
    "alphas in the header": (
        lora(
            lambda s: {name: value for name, value in dotted(s).items() if ".to_q." in name},
            lora_adapter_metadata='{"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}',
        ),
        {"comfyui": ("ignores", "alphas in a config")},
    ),
    "of another model": (
        lora(lambda s: {n.replace("down_blocks_1", "down_blocks_7"): v for n, v in s.items()}),
        {"files": ("refuses", "does not fit its base")},
    ),
    "NaN": (lora(with_nan), {"files": ("refuses", "NaN")}),
    "no up factor": (
        lora(lambda s: {n: v for n, v in s.items() if "lora_up" not in n}),
        {"files": ("refuses", "factors are missing")},
    ),
    "unknown part": (
        lora(lambda s: s | {f"{UNET}.odd": torch.ones(2)}),
        {"files": ("warns", "merge itself does not read this"), "diffusers": ("refuses", "only LoRA is loaded")},
    ),
    "LoRA of convolutions with a core": (
        lora(lambda s: s | {f"{UNET}.lora_mid.weight": torch.ones(2, 2)}),
        {"diffusers": ("refuses", "only LoRA is loaded")},
    ),
}
