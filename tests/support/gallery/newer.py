"""Layouts of LoRA files of the image and video models after Flux.1."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from support.gallery.diffusion import A_B, AI_TOOLKIT, KOHYA, D, Modules, Shape, case, dotted, flat, kohya, parts, same
from support.gallery.kinds import diff, lora
from support.gallery.layout import Layout, Part

__all__ = ["NEWER"]

BLOCK = "transformer_blocks.0"
FLUX2 = same(**{
    "double_blocks.0.img_attn.qkv": (3 * D, D),
    "double_blocks.0.txt_mlp.0": (6 * D, D),
    "single_blocks.0.linear1": (9 * D, D),
    "double_stream_modulation_img.lin": (6 * D, D),
})  # fmt: skip
FLUX2_DIFFUSERS = {
    **{f"{BLOCK}.attn.to_{part}": ("double_blocks.0.img_attn.qkv", (D, D), n * D) for n, part in enumerate("qkv")},
    f"{BLOCK}.ff_context.linear_in": ("double_blocks.0.txt_mlp.0", (6 * D, D), 0),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": ("single_blocks.0.linear1", (9 * D, D), 0),
    "double_stream_modulation_img.linear": ("double_stream_modulation_img.lin", (6 * D, D), 0),
}
CHROMA = same(**{
    "double_blocks.0.img_attn.qkv": (3 * D, D),
    "distilled_guidance_layer.layers.0.in_layer": (D, D),
})  # fmt: skip
HIDREAM = same(**{
    "double_stream_blocks.0.block.attn1.to_q": (D, D),
    "double_stream_blocks.0.block.attn1.to_k_t": (D, D),
    "single_stream_blocks.0.block.ff_i.experts.1.w1": (2 * D, D),
})  # fmt: skip
SD35 = same(**{"joint_blocks.0.x_block.attn.qkv": (3 * D, D), "joint_blocks.0.x_block.attn2.qkv": (3 * D, D)})
LUMINA = {
    "layers.0.attn.to_q": ("layers.0.attention.qkv", (D, D), 0),
    "layers.0.attn.to_k": ("layers.0.attention.qkv", (D // 2, D), D),
    "layers.0.attn.to_v": ("layers.0.attention.qkv", (D // 2, D), D + D // 2),
    "layers.0.norm1.linear": ("layers.0.adaLN_modulation.1", (4 * D, D), 0),
}
LUMINA_SIZES = {"layers.0.attention.qkv.weight": (2 * D, D)}
QWEN = same(**{f"{BLOCK}.attn.to_q": (D, D), f"{BLOCK}.img_mlp.net.2": (D, 4 * D)})
Z_IMAGE = same(**{"layers.0.attention.qkv": (3 * D, D), "layers.0.adaLN_modulation.0": (4 * D, D)})
KREA2 = same(**{"blocks.0.attn.wq": (D, D), "blocks.0.mlp.gate": (2 * D, D)})
WAN22 = same(**{"blocks.0.self_attn.q": (D, D), "blocks.1.ffn.2": (D, 2 * D)})
WAN22_DIFFUSERS = {
    "blocks.0.attn1.to_q": ("blocks.0.self_attn.q", (D, D), 0),
    "blocks.1.ffn.net.2": ("blocks.1.ffn.2", (D, 2 * D), 0),
}
VACE = same(**{"vace_blocks.0.self_attn.q": (D, D), "blocks.0.self_attn.q": (D, D)})
HUNYUAN15 = same(**{"double_blocks.0.img_attn_q": (D, D), "double_blocks.0.txt_attn_proj": (D, D)})
LTX = same(**{f"{BLOCK}.attn1.to_q": (D, D), f"{BLOCK}.ff.net.0.proj": (4 * D, D)})
LTX2 = same(**{f"{BLOCK}.audio_attn1.to_q": (D, D), f"{BLOCK}.attn1.to_k": (D, D)})
COSMOS = same(**{"blocks.0.self_attn.q_proj": (D, D), "blocks.0.mlp.layer1": (4 * D, D)})
ANIMA = {**COSMOS, **same(**{"llm_adapter.blocks.0.self_attn.q_proj": (D, D)})}
MOCHI = same(**{"blocks.0.attn.qkv_x": (3 * D, D), "blocks.0.attn.proj_x": (D, D)})

COMFYUI: tuple[tuple[str, Modules, Mapping[str, str]], ...] = (
    ("Flux.2", FLUX2, {}),
    ("Chroma", CHROMA, {}),
    ("HiDream", HIDREAM, {}),
    ("Stable Diffusion 3.5", SD35, {"modelspec.architecture": "stable-diffusion-3.5-large/lora"}),
    ("Qwen-Image-Edit", QWEN, {"ss_base_model_version": "qwen_image_edit"}),
    ("Z-Image Turbo", Z_IMAGE, {"ss_base_model_version": "zimage_turbo"}),
    ("Krea 2", KREA2, {}),
    ("Wan 2.1 or 2.2", WAN22, {}),
    ("Wan 2.1 VACE", VACE, {}),
    ("LTX-Video", LTX, {}),
    ("LTX-2", LTX2, {}),
)
"""Families with the names that ComfyUI reads, and what headers state."""


def _trainers() -> Iterator[Layout]:
    for model, modules, header in COMFYUI:
        held = parts(modules, dotted("diffusion_model."))
        yield case("ai-toolkit", model, "2026", held, lora(), "ComfyUI", header={**AI_TOOLKIT, **header})
    for model, modules, network in (
        ("Flux.2", FLUX2, "networks.lora_flux_2"),
        ("HunyuanVideo 1.5", HUNYUAN15, "networks.lora_hv_1_5"),
        ("Krea 2", KREA2, "networks.lora_krea2"),
        ("Wan 2.1 or 2.2", WAN22, "networks.lora_wan"),
    ):
        yield kohya("musubi-tuner", model, "0.3", modules, network)
    klein = {"modelspec.architecture": "flux-2-klein-4b/lora"}
    yield kohya("musubi-tuner", "Flux.2 klein", "0.3", FLUX2, "networks.lora_flux_2", header=klein)
    yield kohya("sd-scripts", "Anima", "0.10", ANIMA, "networks.lora_anima")
    yield kohya("sd-scripts", "Chroma", "0.9", CHROMA, "networks.lora_flux", header={"ss_base_model_version": "chroma"})
    pipe = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    for model, modules in (("Cosmos Predict 2 or Anima", COSMOS), ("LTX-Video", LTX), ("Chroma", CHROMA)):
        yield case("diffusion-pipe", model, "2025", parts(modules, dotted("diffusion_model.")), lora(), "ComfyUI",
                   config=pipe, weights="adapter_model.safetensors")  # fmt: skip


def _diffusers() -> Iterator[Layout]:
    def saved(
        model: str, modules: Modules, sizes: Mapping[str, Shape] | None = None, part: str = "transformer"
    ) -> Layout:
        stated = json.dumps({f"{part}.r": 2, f"{part}.lora_alpha": 6})
        return case("diffusers", model, "0.38", parts(modules, dotted(f"{part}.")), lora(A_B, scale=3), "diffusers",
                    header={"lora_adapter_metadata": stated}, sizes=sizes or {})  # fmt: skip

    yield saved("Flux.2", FLUX2_DIFFUSERS, {"double_blocks.0.img_attn.qkv.weight": (3 * D, D)})
    yield saved("Lumina 2", LUMINA, LUMINA_SIZES)
    yield saved("LTX-Video", LTX)
    yield saved("HiDream", HIDREAM)
    yield saved("Wan 2.1 or 2.2", WAN22_DIFFUSERS)
    second = parts(WAN22_DIFFUSERS, dotted("transformer_2."))
    yield case("diffusers", "Wan 2.2", "the second of two transformers", second, lora(), "diffusers")


def _others() -> Iterator[Layout]:
    yield kohya("OneTrainer", "Chroma", "2025", CHROMA, "", header={"ot_branch": "master"})
    yield case("OneTrainer", "HiDream", "2025", parts(HIDREAM, dotted("transformer.")), lora(KOHYA, 1.0), "diffusers",
               header={"ot_branch": "master"})  # fmt: skip
    yield kohya("LyCORIS", "HiDream", "SimpleTuner", HIDREAM, "", prefix="lycoris_")
    changed = {
        **parts(LTX, dotted("diffusion_model.")),
        f"diffusion_model.{BLOCK}.attn1.q_norm": Part(f"{BLOCK}.attn1.q_norm.weight", (D,), kind=diff()),
    }
    yield case("unnamed", "LTX-Video", "norms in full", changed, lora(), "ComfyUI", shown="unknown")
    yield case("unnamed", "Mochi 1", "ComfyUI's names", parts(MOCHI, dotted("diffusion_model.")), lora(), "ComfyUI",
               shown="unknown")  # fmt: skip
    yield case("unnamed", "Chroma", "flat names", parts(CHROMA, flat("lora_unet_")), lora(KOHYA, 4.0), "Kohya",
               shown="unknown")  # fmt: skip


NEWER: tuple[Layout, ...] = (*_trainers(), *_diffusers(), *_others())
