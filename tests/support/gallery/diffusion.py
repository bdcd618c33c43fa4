"""Layouts of LoRA files of diffusion models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from support.gallery.kinds import boft, diff, dora, glora, ia3, loha, lokr, lora, oft, tucker
from support.gallery.layout import Kind, Layout, Part

__all__ = ["AI_TOOLKIT", "A_B", "DIFFUSION", "KOHYA", "D", "Modules", "Shape", "case", "dotted", "flat", "kohya",
           "parts", "same"]  # fmt: skip

Shape = tuple[int, ...]
Modules = Mapping[str, tuple[str, Shape, int]]
"""Modules by a program's dotted names: the tensor of the base without ``weight``, their shape, and their first row."""

Stem = Callable[[str], str]

D = 8
KOHYA = ("lora_down.weight", "lora_up.weight")
A_B = ("lora_A.weight", "lora_B.weight")
AI_TOOLKIT = {"software": json.dumps({"name": "ai-toolkit", "version": "0.7"})}


def same(**shapes: Shape) -> dict[str, tuple[str, Shape, int]]:
    return {name: (name, shape, 0) for name, shape in shapes.items()}


def flat(prefix: str) -> Stem:
    return lambda module: prefix + module.replace(".", "_")


def dotted(prefix: str) -> Stem:
    return lambda module: prefix + module


INNER = "transformer_blocks.0"
SD = same(**{
    f"down_blocks.1.attentions.0.{INNER}.attn1.to_q": (D, D),
    f"down_blocks.1.attentions.0.{INNER}.attn2.to_k": (D, 768),
    "mid_block.attentions.0.proj_in": (D, D, 1, 1),
    "up_blocks.3.resnets.0.conv1": (D, D, 3, 3),
})  # fmt: skip
SD2 = same(**{f"mid_block.attentions.0.{INNER}.attn2.to_v": (D, 1024), "mid_block.attentions.0.proj_in": (D, D)})
SDXL = {
    f"input_blocks.4.1.{INNER}.attn1.to_q": (f"model.diffusion_model.input_blocks.4.1.{INNER}.attn1.to_q", (D, D), 0),
    f"middle_block.1.{INNER}.attn2.to_k": (f"model.diffusion_model.middle_block.1.{INNER}.attn2.to_k", (D, 2048), 0),
    "input_blocks.1.0.in_layers.2": ("model.diffusion_model.input_blocks.1.0.in_layers.2", (D, D, 3, 3), 0),
}
SDXL_SIZES = {"conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3 * D, D)}
CLIP_G = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
FLUX = same(**{
    "double_blocks.0.img_attn.qkv": (3 * D, D),
    "double_blocks.0.txt_attn.proj": (D, D),
    "double_blocks.0.img_mlp.0": (4 * D, D),
    "single_blocks.1.linear1": (7 * D, D),
    "single_blocks.1.modulation.lin": (3 * D, D),
})  # fmt: skip
FLUX_SIZES = {f"{name}.weight": shape for name, (_, shape, _) in FLUX.items()}
FLUX_DIFFUSERS = {
    **{f"transformer_blocks.0.attn.to_{part}": ("double_blocks.0.img_attn.qkv", (D, D), n * D)
       for n, part in enumerate("qkv")},
    "transformer_blocks.0.attn.to_add_out": ("double_blocks.0.txt_attn.proj", (D, D), 0),
    "transformer_blocks.0.ff.net.0.proj": ("double_blocks.0.img_mlp.0", (4 * D, D), 0),
    "single_transformer_blocks.1.attn.to_k": ("single_blocks.1.linear1", (D, D), D),
    "single_transformer_blocks.1.proj_mlp": ("single_blocks.1.linear1", (4 * D, D), 3 * D),
    "single_transformer_blocks.1.norm.linear": ("single_blocks.1.modulation.lin", (3 * D, D), 0),
}  # fmt: skip
XLABS = {
    "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", (3 * D, D), 0),
    "double_blocks.0.processor.proj_lora2": ("double_blocks.0.txt_attn.proj", (D, D), 0),
}
SD3 = same(**{
    "joint_blocks.0.x_block.attn.qkv": (3 * D, D),
    "joint_blocks.0.context_block.mlp.fc1": (4 * D, D),
})  # fmt: skip
LUMINA = same(**{"layers.0.attention.qkv": (2 * D, D), "layers.0.adaLN_modulation.1": (4 * D, D)})
WAN = same(**{
    **{f"blocks.0.self_attn.{part}": (D, D) for part in "qkvo"},
    "blocks.0.cross_attn.k_img": (D, D),
    "blocks.1.ffn.0": (2 * D, D),
})  # fmt: skip
WAN_DIFFUSERS = {
    "blocks.0.attn1.to_q": ("blocks.0.self_attn.q", (D, D), 0),
    "blocks.0.attn2.add_k_proj": ("blocks.0.cross_attn.k_img", (D, D), 0),
    "blocks.1.ffn.net.0.proj": ("blocks.1.ffn.0", (2 * D, D), 0),
}
HUNYUAN = same(**{
    "double_blocks.0.img_attn_qkv": (3 * D, D),
    "double_blocks.0.txt_mlp.fc1": (4 * D, D),
    "single_blocks.0.linear1": (7 * D, D),
    "single_blocks.0.modulation.linear": (3 * D, D),
})  # fmt: skip
QWEN = same(**{
    "transformer_blocks.0.attn.to_q": (D, D),
    "transformer_blocks.0.attn.add_k_proj": (D, D),
    "transformer_blocks.0.img_mlp.net.0.proj": (4 * D, D),
    "transformer_blocks.1.txt_mod.1": (6 * D, D),
})  # fmt: skip
Z_IMAGE = {
    **{f"layers.0.attention.to_{part}": ("layers.0.attention.qkv", (D, D), n * D) for n, part in enumerate("qkv")},
    "layers.0.attention.to_out.0": ("layers.0.attention.out", (D, D), 0),
    "layers.0.adaLN_modulation.0": ("layers.0.adaLN_modulation.0", (4 * D, D), 0),
}
Z_SIZES = {"layers.0.attention.qkv.weight": (3 * D, D)}
CLIP = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def parts(modules: Modules, stem: Stem, kinds: Mapping[str, Kind] | None = None) -> dict[str, Part]:
    """The parts of all modules; only of those with a kind if any are given."""
    return {
        stem(module): Part(f"{name}.weight", shape, start, (kinds or {}).get(module))
        for module, (name, shape, start) in modules.items()
        if kinds is None or module in kinds
    }


def case(
    trainer: str, model: str, version: str, modules: Mapping[str, Part], kind: Kind, dialect: str, **facts: Any
) -> Layout:
    shown = facts.pop("shown", trainer)
    return Layout(trainer=trainer, model=model, version=version, dialect=dialect, shown=shown,
                  modules=modules, kind=kind, **{"family": model, **facts})  # fmt: skip


def kohya(trainer: str, model: str, version: str, modules: Modules, network: str, **facts: Any) -> Layout:
    """A file with flat names, alphas, and the header of sd-scripts."""
    prefix, header = facts.pop("prefix", "lora_unet_"), facts.pop("header", {})
    kind = facts.pop("kind", lora(KOHYA, 1.0))
    held = facts.pop("held", None) or parts(modules, flat(prefix))
    return case(trainer, model, version, held, kind, "Kohya",
                header={"ss_network_module": network, "ss_network_dim": "2", **header} if network else header,
                **facts)  # fmt: skip


SD1_NAME, SD2_NAME, XL_NAME = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL"


def _sd_scripts() -> Iterator[Layout]:
    module = "networks.lora"
    text = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj": Part(f"{CLIP}.weight", (D, D))}
    yield kohya("sd-scripts", SD1_NAME, "2023", SD, module, held={**parts(SD, flat("lora_unet_")), **text})
    yield kohya("sd-scripts", SD1_NAME, "no alphas", SD, "", kind=lora(KOHYA), shown="unknown")
    yield kohya("sd-scripts", SD2_NAME, "2023", SD2, module, header={"ss_v2": "True"})
    second = {"lora_te2_text_model_encoder_layers_0_self_attn_k_proj": Part(CLIP_G, (D, D), D)}
    yield kohya("sd-scripts", XL_NAME, "0.9, two text encoders", SDXL, module, sizes=SDXL_SIZES,
                held={**parts(SDXL, flat("lora_unet_")), **second})  # fmt: skip
    yield kohya("sd-scripts", "Flux.1", "0.9", FLUX, "networks.lora_flux")
    yield kohya("sd-scripts", "Stable Diffusion 3", "0.9", SD3, "networks.lora_sd3")
    yield kohya("sd-scripts", "Lumina 2", "0.9", LUMINA, "networks.lora_lumina")
    yield kohya("sd-scripts", SD1_NAME, "DyLoRA", SD, "networks.dylora", kind=lora(KOHYA, 3.0))


def _lycoris() -> Iterator[Layout]:
    by = {"network": "lycoris.kohya", "shown": "sd-scripts with LyCORIS"}
    matrix = f"middle_block.1.{INNER}.attn2.to_k"
    kernel = "input_blocks.1.0.in_layers.2"

    def some(version: str, kind: Kind, *modules: str, prefix: str = "lora_unet_", **facts: Any) -> Layout:
        held = parts(SDXL, flat(prefix), dict.fromkeys(modules or (matrix,), kind))
        return kohya("LyCORIS", XL_NAME, version, SDXL, held=held, **{**by, **facts})

    yield some("LoCon", lora(KOHYA, 1.0), matrix, kernel)
    yield some("LoCon with a core", tucker(1.0), kernel, family="Stable Diffusion")
    yield some("LoHa", loha(1.0), matrix, kernel)
    yield some("LoKr, one side factored", lokr(1.0, factored=True))
    yield some("LoKr, both sides full", lokr(1.0, factored=False))
    yield some("changes in full", diff(), matrix, kernel)
    yield some("GLoRA", glora(1.0), needs_base=True)
    yield some("IA3", ia3("weight", added=True), needs_base=True, family="Stable Diffusion")
    yield some("IA3 on inputs", ia3("weight", added=True, on_input=True), needs_base=True, family="Stable Diffusion")
    yield some("Diag-OFT", oft(), needs_base=True, family="Stable Diffusion")
    yield some("BOFT", boft(), needs_base=True, family="Stable Diffusion")
    for version, over_inputs in (("DoRA", False), ("DoRA, old files", True)):
        kind = dora(KOHYA, "dora_scale", scale=1.0, over_inputs=over_inputs)
        yield some(version, kind, needs_base=True)
    yield kohya("SimpleTuner", "Flux.1", "LyCORIS", FLUX, "", prefix="lycoris_", kind=lokr(1.0, factored=True),
                shown="LyCORIS")  # fmt: skip


def _ai_toolkit() -> Iterator[Layout]:
    forms: tuple[tuple[str, Modules, str, str, Mapping[str, Shape]], ...] = (
        ("Flux.1", FLUX_DIFFUSERS, "transformer.", "diffusers", FLUX_SIZES),
        ("Wan 2.1 I2V", WAN, "diffusion_model.", "ComfyUI", {}),
        ("Z-Image", Z_IMAGE, "diffusion_model.", "ComfyUI", Z_SIZES),
        ("Qwen-Image", QWEN, "diffusion_model.", "ComfyUI", {}),
    )
    for model, modules, prefix, dialect, sizes in forms:
        yield case("ai-toolkit", model, "2025", parts(modules, dotted(prefix)), lora(), dialect,
                   header=AI_TOOLKIT, sizes=sizes)  # fmt: skip
    yield kohya("ai-toolkit", XL_NAME, "2024", SDXL, "", header=AI_TOOLKIT)
    yield case("ai-toolkit", "Flux.1", "LoKr", parts(FLUX, dotted("diffusion_model.")), lokr(1.0, factored=True),
               "ComfyUI", header=AI_TOOLKIT)  # fmt: skip


def _musubi() -> Iterator[Layout]:
    for model, modules, network, sizes in (
        ("Wan 2.1 I2V", WAN, "networks.lora_wan", {}),
        ("HunyuanVideo", HUNYUAN, "networks.lora_framepack", {}),
        ("Qwen-Image", QWEN, "networks.lora_qwen_image", {}),
        ("Z-Image", Z_IMAGE, "networks.lora_zimage", Z_SIZES),
    ):
        yield kohya("musubi-tuner", model, "0.2", modules, network, sizes=sizes)
    kontext = {"ss_base_model_version": "flux_kontext"}
    yield kohya("musubi-tuner", "Flux.1 Kontext", "0.2", FLUX, "networks.lora_flux", header=kontext)
    yield case("musubi-tuner", "Wan 2.1 I2V", "made for other programs", parts(WAN, dotted("diffusion_model.")),
               lora(), "ComfyUI", shown="unknown")  # fmt: skip


def _diffusers() -> Iterator[Layout]:
    processors = {
        f"unet.mid_block.attentions.0.{INNER}.attn2.processor.to_k_lora": Part(
            f"mid_block.attentions.0.{INNER}.attn2.to_k.weight", (D, 768)
        ),
        f"unet.mid_block.attentions.0.{INNER}.attn2.processor.to_out_lora": Part(
            f"mid_block.attentions.0.{INNER}.attn2.to_out.0.weight", (D, D)
        ),
    }
    old = {"shown": "diffusers before 0.21"}
    yield case("diffusers", SD1_NAME, "0.14", processors, lora(("down.weight", "up.weight")), "diffusers", **old)
    pairs = ("lora.down.weight", "lora.up.weight")
    sd = parts(SD, dotted("unet."))
    yield case("diffusers", SD1_NAME, "0.20", sd, lora(pairs), "diffusers")
    layered = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": Part(f"{CLIP}.weight", (D, D))}
    linear = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
    yield case("diffusers", SD1_NAME, "0.19, text encoder", {**parts(SD, dotted("unet.")), **layered}, lora(linear),
               "diffusers", **old)  # fmt: skip
    yield case("diffusers", SD1_NAME, "0.25", sd, lora(), "diffusers")
    stated = {"transformer.r": 2, "transformer.lora_alpha": 6}
    header = {"lora_adapter_metadata": json.dumps(stated)}
    flux = parts(FLUX_DIFFUSERS, dotted("transformer."))
    yield case("diffusers", "Flux.1", "0.35", flux, lora(scale=3), "diffusers", header=header, sizes=FLUX_SIZES)
    yield case("diffusers", "Wan 2.1 I2V", "0.35, rsLoRA", parts(WAN_DIFFUSERS, dotted("transformer.")),
               lora(scale=6 / 2**0.5), "diffusers",
               header={"lora_adapter_metadata": json.dumps({**stated, "transformer.use_rslora": True})})  # fmt: skip
    yield case("SimpleTuner", "Flux.1", "wrapped twice", parts(FLUX_DIFFUSERS, dotted("transformer.base_model.model.")),
               lora(), "diffusers", sizes=FLUX_SIZES, shown="diffusers")  # fmt: skip
    yield case("SimpleTuner", "Flux.1", "2.0", flux, lora(scale=3), "diffusers", header=header, sizes=FLUX_SIZES,
               tags=("simpletuner", "lora"), weights="pytorch_lora_weights.safetensors")  # fmt: skip


def _others() -> Iterator[Layout]:
    pipe = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    for model, modules in (("Wan 2.1 I2V", WAN), ("HunyuanVideo", HUNYUAN)):
        yield case("diffusion-pipe", model, "2025", parts(modules, dotted("diffusion_model.")), lora(), "ComfyUI",
                   config=pipe, weights="adapter_model.safetensors")  # fmt: skip
    trainer = {"ot_branch": "master", "ot_revision": "abc"}
    yield case("OneTrainer", "Flux.1", "2024", parts(FLUX_DIFFUSERS, dotted("transformer.")), lora(KOHYA, 1.0),
               "diffusers", header=trainer, sizes=FLUX_SIZES)  # fmt: skip
    yield kohya("OneTrainer", XL_NAME, "2023", SDXL, "", header=trainer)
    yield kohya("OneTrainer", "Flux.1", "flat names", FLUX_DIFFUSERS, "", header=trainer, prefix="lora_transformer_",
                sizes=FLUX_SIZES)  # fmt: skip
    default = ("lora_A.default.weight", "lora_B.default.weight")
    for model, modules in (("Qwen-Image", QWEN), ("Wan 2.1 I2V", WAN)):
        yield case("DiffSynth-Studio", model, "2025", parts(modules, dotted("")), lora(default), "diffusers")
    yield case("XLabs", "Flux.1", "2024", parts(XLABS, dotted("")), lora(("down.weight", "up.weight")), "XLabs")
    yield case("fal", "Flux.1", "Kontext", parts(FLUX_DIFFUSERS, dotted("base_model.model.")), lora(), "PEFT LORA",
               sizes=FLUX_SIZES, shown="PEFT")  # fmt: skip
    yield kohya("Tencent", "HunyuanVideo", "I2V", HUNYUAN, "", prefix="Hunyuan_video_I2V_lora_")
    yield kohya("VideoX-Fun", "Wan 2.1 I2V", "two underscores", WAN, "", prefix="lora_unet__", shown="unknown")
    changed = {
        **parts(WAN, dotted("diffusion_model.")),
        "diffusion_model.blocks.0.self_attn.q.": Part("blocks.0.self_attn.q.bias", (D,), kind=diff("diff_b")),
        "diffusion_model.blocks.0.norm3": Part("blocks.0.norm3.weight", (D,), kind=diff()),
        "diffusion_model.blocks.0": Part("blocks.0.modulation", (1, 6, D), kind=diff("diff_m")),
    }
    changed["diffusion_model.blocks.0.self_attn.q"] = changed.pop("diffusion_model.blocks.0.self_attn.q")
    yield case("lightx2v", "Wan 2.1 I2V", "distilled", changed, lora(KOHYA), "ComfyUI")
    yield case("lightx2v", "Qwen-Image", "Lightning", parts(QWEN, dotted("")), lora(KOHYA, 1.0), "diffusers",
               shown="unknown")  # fmt: skip
    text = {"text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj":
            Part(f"{CLIP}.weight", (D, D))}  # fmt: skip
    yield case("ComfyUI", SD1_NAME, "with a text encoder", {**parts(SD, dotted("diffusion_model.")), **text},
               lora(KOHYA, 1.0), "ComfyUI", shown="unknown")  # fmt: skip


DIFFUSION: tuple[Layout, ...] = (
    *_sd_scripts(),
    *_lycoris(),
    *_ai_toolkit(),
    *_musubi(),
    *_diffusers(),
    *_others(),
)
