"""Tiny diffusion models with what a LoRA may change of them, and what diffusers makes of one and a LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

__all__ = [
    "BLOCK",
    "FLUX",
    "MODELS",
    "PUBLISHED",
    "TEXT",
    "Shape",
    "State",
    "build",
    "check_closest",
    "components",
    "factors",
    "fused",
    "kohya_modules",
    "on_disk",
    "quietly",
    "state_of",
    "trained",
]

State = dict[str, Tensor]
Shape = tuple[int, ...]

_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def _text(cls: type[nn.Module] = CLIPTextModel) -> nn.Module:
    settings = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "projection_dim": 8}
    tokens = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    return cls(CLIPTextConfig(**settings, **tokens, num_hidden_layers=2))


def _sd() -> DiffusionPipeline:
    """Stable Diffusion, its U-Net two levels deep."""
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=_text(),
        tokenizer=None,
        unet=UNet2DConditionModel(**_UNET),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> DiffusionPipeline:
    """SDXL: two text encoders, and a U-Net with linear projections around up to two transformer blocks."""
    unet = UNet2DConditionModel(
        **_UNET,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=_text(),
        text_encoder_2=_text(CLIPTextModelWithProjection),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=DDIMScheduler(),
    )


def _flux() -> DiffusionPipeline:
    """Flux with one block of each kind, and without its T5."""
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=_text(),
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        transformer=transformer,
    )


MODELS: dict[str, Callable[[], DiffusionPipeline]] = {"sd": _sd, "sdxl": _sdxl, "flux": _flux}


def build(name: str) -> DiffusionPipeline:
    """One of the models, always with the same weights."""
    torch.manual_seed(0)
    with quietly():
        return MODELS[name]()


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of diffusers, and of libraries about what it asks of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def components(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks of a pipeline, by name."""
    found = {name: getattr(pipeline, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    return {name: module for name, module in found.items() if module is not None}


def state_of(pipeline: DiffusionPipeline) -> State:
    """All weights of a pipeline, behind the names of their components."""
    return {
        f"{part}.{name}": value.detach().clone()
        for part, module in components(pipeline).items()
        for name, value in module.state_dict().items()
    }


def on_disk(folder: Path) -> State:
    """All weights of a pipeline's folder, behind the names of their components."""
    return {
        f"{file.parent.name}.{name}": value
        for file in folder.glob("*/*.safetensors")
        for name, value in load_file(file).items()
    }


def fused(pipeline: DiffusionPipeline, lora: Path) -> State:
    """The weights of a pipeline when diffusers has loaded a LoRA's file and fused it."""
    with quietly():
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name, low_cpu_mem_usage=False)
        pipeline.fuse_lora(components=list(components(pipeline)))
        pipeline.unload_lora_weights()
    return state_of(pipeline)


def factors(path: Path, modules: Mapping[str, tuple[Shape, float | None]], seed: int = 1, rank: int = 2) -> Path:
    """A file of Kohya's kind with random factors for modules of these shapes, and alphas where they are given."""
    random = torch.Generator().manual_seed(seed)
    state: State = {}
    for module, ((outputs, inputs, *kernel), alpha) in modules.items():
        down = torch.randn(rank, inputs, *kernel, generator=random)
        up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=random)
        state |= {f"{module}.lora_down.weight": 0.3 * down, f"{module}.lora_up.weight": 0.3 * up}
        if alpha is not None:
            state[f"{module}.alpha"] = torch.tensor(float(alpha))
    save_file(state, path)
    return path


def check_closest(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], before: Mapping[str, Tensor], changed: int
) -> None:
    """The same tensors within rounding, of which so many are not what they were before."""
    assert got.keys() == wanted.keys()
    off = {name: float((got[name] - wanted[name]).abs().max()) for name in wanted}
    wrong = {name: error for name, error in off.items() if not error <= 2e-6}
    assert not wrong, wrong
    assert sum(not torch.equal(wanted[name], before[name]) for name in wanted) == changed


TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj"],
    "transformer": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "norm_out.linear"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
"""What :func:`trained` changes of each component."""


def trained(
    model: str,
    folder: Path,
    *,
    stated: bool = True,
    parts: Sequence[str] = tuple(TARGETS),
    converted: Sequence[str] = ("text_encoder", "text_encoder_2"),
    seed: int = 5,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """What diffusers saves of a pipeline with random LoRAs; ``stated``: with their configs in the header.

    ``converted`` are the components whose names its training scripts turn into older ones before.
    """
    pipeline: DiffusionPipeline = build(model).to(dtype)
    random = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {}
    with quietly(), torch.no_grad():
        for part, module in ((part, module) for part, module in components(pipeline).items() if part in parts):
            settings = {"r": 2, "lora_alpha": 2, "target_modules": TARGETS[part], **config}
            module.add_adapter(LoraConfig(**settings))
            for name, value in module.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(value.shape, generator=random)
                    value.copy_(value * (1 + 0.2 * noise) if "magnitude" in name else 0.3 * noise)
            state = get_peft_model_state_dict(module)
            layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if part in converted else state
            if stated:
                layers[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
        pipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


FLUX: dict[str, Shape] = {
    "double_blocks.0.img_attn.qkv": (48, 16),
    "double_blocks.0.txt_attn.qkv": (48, 16),
    "double_blocks.0.img_attn.proj": (16, 16),
    "double_blocks.0.img_mlp.0": (64, 16),
    "double_blocks.0.txt_mlp.2": (16, 64),
    "double_blocks.0.img_mod.lin": (96, 16),
    "single_blocks.0.linear1": (112, 16),
    "single_blocks.0.linear2": (16, 80),
    "final_layer.linear": (4, 16),
}
"""Modules of the tiny Flux as published."""


BLOCK, PUBLISHED = "lora_unet_down_blocks_1_attentions_0", "lora_unet_input_blocks_4_1"
TEXT = "text_model_encoder_layers_0"


def kohya_modules(model: str, alpha: float | None) -> dict[str, tuple[Shape, float | None]]:
    """Modules of every kind, as sd-scripts names them, their shapes, and an alpha for each."""
    shapes: dict[str, Shape] = {}
    if model == "sd":
        shapes |= {f"{BLOCK}_proj_in": (16, 16, 1, 1), "lora_unet_mid_block_attentions_0_proj_out": (16, 16, 1, 1)}
        shapes |= {f"{BLOCK}_transformer_blocks_0_attn1_to_q": (16, 16)}
        shapes |= {f"{BLOCK}_transformer_blocks_0_attn2_to_k": (16, 8)}
        shapes |= {f"{BLOCK}_transformer_blocks_0_attn1_to_out_0": (16, 16)}
        shapes |= {f"{BLOCK}_transformer_blocks_0_ff_net_0_proj": (128, 16)}
        shapes |= {"lora_unet_up_blocks_0_resnets_1_conv1": (16, 32, 3, 3)}
        shapes |= {"lora_unet_up_blocks_1_resnets_0_conv_shortcut": (8, 24, 1, 1)}
        shapes |= {"lora_unet_down_blocks_1_resnets_0_time_emb_proj": (16, 32)}
    if model == "sdxl":
        shapes |= {f"{PUBLISHED}_proj_in": (16, 16), "lora_unet_middle_block_1_proj_out": (16, 16)}
        shapes |= {f"{PUBLISHED}_transformer_blocks_0_attn1_to_q": (16, 16)}
        shapes |= {f"{PUBLISHED}_transformer_blocks_1_attn2_to_k": (16, 8)}
        shapes |= {f"{PUBLISHED}_transformer_blocks_1_ff_net_2": (16, 64)}
        shapes |= {"lora_unet_output_blocks_2_2_conv": (16, 16, 3, 3), "lora_unet_input_blocks_3_0_op": (8, 8, 3, 3)}
        shapes |= {"lora_unet_input_blocks_4_0_in_layers_2": (16, 8, 3, 3)}
        shapes |= {"lora_unet_input_blocks_4_0_emb_layers_1": (16, 32)}
        shapes |= {"lora_unet_input_blocks_4_0_skip_connection": (16, 8, 1, 1)}
        shapes |= {"lora_unet_label_emb_0_0": (32, 32), "lora_unet_time_embed_2": (32, 32)}
    if model == "flux":
        shapes |= {"lora_unet_" + name.replace(".", "_"): shape for name, shape in FLUX.items()}
    for prefix in {"sd": ("lora_te",), "sdxl": ("lora_te1", "lora_te2"), "flux": ("lora_te1",)}[model]:
        attention = {f"{prefix}_{TEXT}_self_attn_{part}_proj": (8, 8) for part in ("q", "k", "v", "out")}
        shapes |= {**attention, f"{prefix}_{TEXT}_mlp_fc1": (12, 8)}
    return {name: (shape, alpha) for name, shape in shapes.items()}
