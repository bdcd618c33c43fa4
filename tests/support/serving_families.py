"""LoRA files of diffusion models by family and by the layout of their names, and what real programs load of them.

A row of ``LOADED`` is what diffusers 0.42.1 (its own loader on tiny models) and ComfyUI 0.8.0 (its
``model_lora_keys_unet`` and ``load_lora``) were seen to take, by layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from support.diffusion_models import quietly

__all__ = ["LAYOUTS", "LOADED", "UNTOLD", "loaded_by_diffusers", "modules_in", "write_layout"]

_QKV = {"attn.qkv": "attn.to_q attn.to_k attn.to_v", "attn.proj": "attn.to_out.0"}
_DOUBLE = {"img_attn.qkv": _QKV["attn.qkv"], "txt_attn.proj": "attn.to_add_out"}


def _blocks(published: str, converted: str, modules: Mapping[str, str]) -> dict[str, list[str]]:
    return {
        f"{published}.{ours}": [f"{converted}.{each}" for each in theirs.split()] for ours, theirs in modules.items()
    }


def _alike(block: str, modules: str) -> dict[str, list[str]]:
    return _blocks(block, block, {module: module for module in modules.split()})


_FLUX = {
    **_blocks("double_blocks.0", "transformer_blocks.0",
              {**_DOUBLE, "img_mlp.0": "ff.net.0.proj", "txt_mlp.2": "ff_context.net.2",
               "img_mod.lin": "norm1.linear"}),
    **_blocks("single_blocks.0", "single_transformer_blocks.0",
              {"linear2": "proj_out", "modulation.lin": "norm.linear"}),
}  # fmt: skip


def _refined(attention: str, modules: Mapping[str, str]) -> dict[str, list[str]]:
    """The blocks of Z-Image and of Lumina 2."""
    qkv = {"attention.qkv": f"{attention}.to_q {attention}.to_k {attention}.to_v"}
    every = {**qkv, "attention.out": f"{attention}.to_out.0", **modules}
    blocks = [_blocks(block, block, every) for block in ("layers.0", "noise_refiner.0")]
    return blocks[0] | blocks[1]


MODULES: dict[str, dict[str, list[str]]] = {
    "sd3": _blocks("joint_blocks.0", "transformer_blocks.0",
                   {f"x_block.{ours}": theirs for ours, theirs in _QKV.items()}
                   | {"x_block.mlp.fc1": "ff.net.0.proj", "context_block.adaLN_modulation.1": "norm1_context.linear"}),
    "flux": _FLUX,
    "flux2": {
        **_blocks("double_blocks.0", "transformer_blocks.0", {**_DOUBLE, "img_mlp.0": "ff.linear_in"}),
        **_blocks("single_blocks.0", "single_transformer_blocks.0",
                  {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}),
        "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    },
    "hunyuan": _FLUX,
    "wan": _blocks("blocks.0", "blocks.0",
                   {"self_attn.q": "attn1.to_q", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj"}),
    "qwen": _alike("transformer_blocks.0", "attn.to_q attn.to_out.0 attn.add_k_proj img_mlp.net.2 txt_mod.1"),
    "z-image": _refined("attention", {"feed_forward.w1": "feed_forward.w1"}),
    "lumina2": _refined("attn", {"feed_forward.w1": "feed_forward.linear_1", "adaLN_modulation.1": "norm1.linear"}),
    "ltx": _alike("transformer_blocks.0", "attn1.to_q attn2.to_out.0 ff.net.0.proj ff.net.2"),
    "ltx2": _alike("transformer_blocks.0", "attn1.to_q audio_attn1.to_q audio_to_video_attn.to_q audio_ff.net.2")
    | {"patchify_proj": ["proj_in"], "adaln_single.linear": ["time_embed.linear"]},
    "hidream": _alike("double_stream_blocks.0.block",
                      "attn1.to_q attn1.to_q_t ff_i.experts.0.w1 ff_i.shared_experts.w1"),
    "anima": _blocks("blocks.0", "transformer_blocks.0",
                     {"self_attn.q_proj": "attn1.to_q", "cross_attn.output_proj": "attn2.to_out.0",
                      "mlp.layer1": "ff.net.0.proj", "adaln_modulation_self_attn.1": "norm1.linear_1"}),
    "cosmos1": {
        **_blocks("blocks.block0.blocks", "transformer_blocks.0",
                  {"0.block.attn.to_q.0": "attn1.to_q", "1.block.attn.to_out.0": "attn2.to_out.0",
                   "2.block.layer1": "ff.net.0.proj", "0.adaLN_modulation.1": "norm1.linear_1"})
    },
    "cosmos2": _blocks("blocks.0", "transformer_blocks.0",
                       {"self_attn.q_proj": "attn1.to_q", "cross_attn.output_proj": "attn2.to_out.0",
                        "mlp.layer1": "ff.net.0.proj", "adaln_modulation_self_attn.1": "norm1.linear_1"}),
    "mochi": _blocks("blocks.0", "transformer_blocks.0",
                     {"attn.qkv_x": "attn1.to_q attn1.to_k attn1.to_v", "attn.proj_y": "attn1.to_add_out",
                      "mlp_x.w2": "ff.net.2", "mod_x": "norm1.linear"}),
    "ernie": _alike("layers.0", "self_attention.to_q self_attention.to_out.0 mlp.gate_proj"),
}  # fmt: skip
"""A few modules of each family, as published, and what diffusers has instead."""

LAYOUTS: dict[str, tuple[str, str, str]] = {
    "diffusers": ("transformer.", "diffusers", "A"),
    "bare, default": ("", "diffusers", "default"),
    "bare, down and up": ("", "diffusers", "down"),
    "ComfyUI": ("diffusion_model.", "published", "A"),
    "ComfyUI of diffusers' names": ("diffusion_model.", "diffusers", "A"),
    "Kohya": ("lora_unet_", "published", "down"),
    "Kohya of diffusers' names": ("lora_unet_", "diffusers", "down"),
    "LyCORIS": ("lycoris_", "diffusers", "down"),
    "OneTrainer": ("transformer.", "diffusers", "down"),
    "PEFT": ("base_model.model.", "published", "A"),
    "PEFT of diffusers' names": ("base_model.model.", "diffusers", "A"),
    "second transformer": ("transformer_2.", "diffusers", "A"),
    "first release": ("transformer.", "first", "A"),
}
"""What stands before a module's path, whose path it is, and the form of the factors."""

_MUCH = {"a": "all", "s": "some", "n": "none"}
_LOADED = {
    "sd3": "aa nn nn na nn na nn na na nn na nn -",
    "flux": "aa nn nn na nn aa nn na na an nn nn -",
    "flux2": "as nn nn aa nn sa nn ns ns an nn nn -",
    "hunyuan": "an nn nn na nn na nn nn nn nn nn nn aa",
    "wan": "an nn nn aa nn aa nn nn nn nn nn nn -",
    "qwen": "aa aa aa aa aa aa aa na na nn nn nn -",
    "z-image": "aa an an sa aa aa as na na nn nn nn -",
    "lumina2": "an nn nn aa nn na nn nn nn nn nn nn -",
    "ltx": "an nn nn aa aa na na nn nn nn nn nn -",
    "ltx2": "an nn nn aa as na ns nn nn nn nn nn -",
    "hidream": "aa nn nn aa aa na na na na nn nn nn -",
    "anima": "an nn nn aa nn na nn nn nn nn nn nn -",
    "ernie": "an nn nn aa aa na na nn nn an an nn -",
}

LOADED = {
    (family, layout): (_MUCH[cell[0]], _MUCH[cell[1]])
    for family, cells in _LOADED.items()
    for layout, cell in zip(LAYOUTS, cells.split(), strict=True)
    if cell != "-"
}
"""By family and layout how much diffusers, then ComfyUI loads: all modules, some, or none."""

UNTOLD = {("flux", "PEFT"), ("lumina2", "ComfyUI"), ("wan", "Kohya")}
"""Where the converter of diffusers wants the real model's sizes, or all of its modules."""

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd3": ("SD3", "SD3Transformer2DModel",
            {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12,
             "pooled_projection_dim": 8, "caption_projection_dim": 16}),
    "flux": ("Flux", "FluxTransformer2DModel",
             {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
              "joint_attention_dim": 12, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4), "in_channels": 4}),
    "flux2": ("Flux2", "Flux2Transformer2DModel",
              {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
               "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 2, 2), "in_channels": 4}),
    "hunyuan": ("HunyuanVideo", "HunyuanVideoTransformer3DModel",
                {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "attention_head_dim": 8,
                 "num_attention_heads": 2, "text_embed_dim": 12, "pooled_projection_dim": 8,
                 "rope_axes_dim": (2, 2, 4)}),
    "wan": ("Wan", "WanTransformer3DModel",
            {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16,
             "freq_dim": 16}),
    "qwen": ("QwenImage", "QwenImageTransformer2DModel",
             {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16,
              "axes_dims_rope": (2, 2, 4), "in_channels": 4, "out_channels": 1}),
    "z-image": ("ZImage", "ZImageTransformer2DModel",
                {"n_layers": 1, "n_refiner_layers": 1, "dim": 16, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8,
                 "in_channels": 4, "axes_dims": [2, 2, 4], "axes_lens": [4, 4, 4]}),
    "lumina2": ("Lumina2", "Lumina2Transformer2DModel",
                {"num_layers": 1, "num_refiner_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
                 "num_kv_heads": 1, "cap_feat_dim": 8, "axes_dim_rope": (2, 2, 4), "multiple_of": 8}),
    "ltx": ("LTXVideo", "LTXVideoTransformer3DModel",
            {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
             "caption_channels": 12}),
    "ltx2": ("LTX2", "LTX2VideoTransformer3DModel",
             {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
              "caption_channels": 12, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
              "audio_cross_attention_dim": 8}),
    "hidream": ("HiDreamImage", "HiDreamImageTransformer2DModel",
                {"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
                 "num_attention_heads": 2, "caption_channels": [12, 12], "text_emb_dim": 8, "num_routed_experts": 2,
                 "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32),
                 "llama_layers": [0, 1]}),
    "anima": ("Anima", "CosmosTransformer3DModel",
              {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 16,
               "adaln_lora_dim": 4}),
    "cosmos1": ("Cosmos", "CosmosTransformer3DModel",
              {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 16,
               "adaln_lora_dim": 4}),
    "cosmos2": ("Cosmos", "CosmosTransformer3DModel",
              {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 16,
               "adaln_lora_dim": 4}),
    "mochi": ("Mochi1", "MochiTransformer3DModel",
              {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "pooled_projection_dim": 8,
               "text_embed_dim": 12, "time_embed_dim": 8}),
    "ernie": ("ErnieImage", "ErnieImageTransformer2DModel",
              {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 24, "in_channels": 4,
               "out_channels": 4, "text_in_dim": 8, "rope_axes_dim": (2, 2, 4)}),
}  # fmt: skip
"""What diffusers calls the loader of each family and its transformer, and the settings of a tiny one."""

_PARTS = re.compile(r"\.(?:lora_\w+(?:\.default)?\.weight|alpha)$")


def _first(module: str) -> str:
    """A module of HunyuanVideo as it was first released."""
    for ours, theirs in ((r"_mod\.lin", "_mod.linear"), (r"_attn\.", "_attn_"), (r"mlp\.0", "mlp.fc1"),
                         (r"mlp\.2", "mlp.fc2"), (r"\.modulation\.lin", ".modulation.linear")):  # fmt: skip
        module = re.sub(rf"{ours}(?=$|\w)", theirs, module)
    return module


def build(family: str) -> nn.Module:
    """The tiny transformer of a family."""
    _, name, settings = _MODELS[family]
    with quietly():
        made: nn.Module = getattr(diffusers, name)(**settings)
        return made


def write_layout(path: Path, family: str, layout: str) -> Path:
    """A LoRA of a family's modules in a layout; its numbers are all 1."""
    prefix, style, form = LAYOUTS[layout]
    model = build(family)
    state: dict[str, Tensor] = {}
    for published, converted in MODULES[family].items():
        named = {published: converted} if style != "diffusers" else {each: [each] for each in converted}
        for name, parts in named.items():
            shapes = [tuple(model.get_submodule(part).weight.shape) for part in parts]  # type: ignore[arg-type]
            module = prefix + (_first(name) if style == "first" else name)
            if prefix.endswith("_"):
                module = prefix + module.removeprefix(prefix).replace(".", "_")
            state |= _factors(module, sum(shape[0] for shape in shapes), shapes[0][1], form)
    save_file(state, path)
    return path


def _factors(module: str, outputs: int, inputs: int, form: str) -> dict[str, Tensor]:
    down, up = torch.ones(2, inputs), torch.ones(outputs, 2)
    if form == "down":
        return {
            f"{module}.lora_down.weight": down,
            f"{module}.lora_up.weight": up,
            f"{module}.alpha": torch.tensor(2.0),
        }
    default = ".default" if form == "default" else ""
    return {f"{module}.lora_A{default}.weight": down, f"{module}.lora_B{default}.weight": up}


def modules_in(path: Path) -> set[str]:
    """The modules of a file, as it names them."""
    return {_PARTS.sub("", name) for name in load_file(path)}


def loaded_by_diffusers(path: Path, family: str) -> str:
    """How much of a file the loader of diffusers puts into the family's transformer: all, some or none of it."""
    loader = getattr(diffusers.loaders.lora_pipeline, f"{_MODELS[family][0]}LoraLoaderMixin")
    model = build(family)
    with quietly():
        try:
            found = loader.lora_state_dict(load_file(path), return_lora_metadata=True)
            if not all("lora" in name for name in found[0]):
                return "none"  # which its pipelines refuse
            alphas = {"network_alphas": None} if family == "flux" else {}
            loader.load_lora_into_transformer(found[0], transformer=model, low_cpu_mem_usage=False, **alphas)
        except (KeyError, RuntimeError, ValueError):
            return "none"
    held = sum(bool(value.abs().sum()) for name, value in model.named_parameters() if "lora_B" in name)
    wanted = sum(map(len, MODULES[family].values()))
    return "all" if held == wanted else "some" if held else "none"
