"""The models of the golden merges: small integers and eighths, so that sums and products of them are not rounded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["make_models"]

Tensors = dict[str, Tensor]

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
LAYERS, WIDTH, VOCABULARY = 3, 8, 12


def integers(seed: int, *shape: int, most: int = 4) -> Tensor:
    """Integers from -most to most by a formula of their own: no generator of another program can change them."""
    count = int(torch.tensor(shape).prod())
    state, values = seed * 7919 + 12345, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        values.append((state >> 16) % (2 * most + 1) - most)
    return torch.tensor(values, dtype=torch.float32).view(shape)


def base_model(vocabulary: int = VOCABULARY) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, WIDTH)}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (2 * WIDTH, WIDTH)
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
    shapes["model.layers.2.mlp.experts.gate_up_proj"] = (2, WIDTH, 2 * WIDTH)
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (vocabulary, WIDTH)}
    return {name: integers(number, *shape, most=8) / 8 for number, (name, shape) in enumerate(shapes.items())}


def fine_tune(base: Mapping[str, Tensor], seed: int, most: int = 4) -> Tensors:
    changes = {
        name: integers(seed * 100 + number, *value.shape, most=most) / 8
        for number, (name, value) in enumerate(base.items())
    }
    return {name: value + changes[name] for name, value in base.items()}


def save(folder: Path, tensors: Tensors, shards: int = 1, **config: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": files})
    )


def factors(seed: int, stem: str, out: int, rank: int, names: tuple[str, str]) -> Tensors:
    return {
        f"{stem}.{names[0]}.weight": integers(seed, rank, WIDTH, most=2),
        f"{stem}.{names[1]}.weight": integers(seed + 1, out, rank, most=2),
    }


def save_adapter(folder: Path, seed: int, rank: int, targets: Mapping[str, int], more: Tensors, **config: Any) -> None:
    tensors = dict(more)
    for layer in range(LAYERS):
        for number, (target, out) in enumerate(targets.items()):
            stem = f"base_model.model.model.layers.{layer}.{target}"
            tensors |= factors(seed + 10 * layer + 2 * number, stem, out, rank, ("lora_A", "lora_B"))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted(target.rpartition(".")[2] for target in targets)
    settings = {"peft_type": "LORA", "r": rank, "target_modules": modules, "base_model_name_or_path": "golden/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))


def save_adapters(folder: Path) -> None:
    up, query = {"mlp.up_proj": 2 * WIDTH}, {"self_attn.q_proj": WIDTH}
    save_adapter(folder / "a", 1000, 2, up | query, {}, lora_alpha=4)
    save_adapter(folder / "b", 2000, 4, up, {}, lora_alpha=8, use_rslora=True)
    save_adapter(folder / "c", 3000, 1, query, {}, lora_alpha=0.5)
    head = {"base_model.model.lm_head.weight": integers(4000, VOCABULARY, WIDTH) / 8}
    save_adapter(folder / "head", 4000, 2, query, head, lora_alpha=2, modules_to_save=["lm_head"])
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": integers(5000, 3, WIDTH) / 8}
    save_adapter(folder / "tokens", 5000, 2, up, rows, lora_alpha=2, trainable_token_indices=[1, 4, 7])
    config = {"lora_alpha": 2, "alpha_pattern": {"layers.1.mlp.up_proj": 8}}
    save_adapter(folder / "patterns", 6000, 2, up | query, {}, **config)


def save_diffusion_loras(folder: Path) -> None:
    """Two of Kohya's and one of diffusers', for the same modules."""
    for number, name in enumerate(("k1", "k2")):
        tensors: Tensors = {}
        for place, leaf in enumerate(("to_q", "to_k")):
            stem = f"lora_unet_{BLOCK}_{leaf}".replace(".", "_")
            tensors |= factors(7000 + 100 * number + 10 * place, stem, WIDTH, 2, ("lora_down", "lora_up"))
            tensors[f"{stem}.alpha"] = torch.tensor(4.0)
        save_file(tensors, folder / f"{name}.safetensors", {"ss_base_model_version": "sd_v1"})
    tensors = {}
    for place, leaf in enumerate(("to_q", "to_k")):
        tensors |= factors(8000 + 10 * place, f"unet.{BLOCK}.{leaf}", WIDTH, 2, ("lora_A", "lora_B"))
    save_file(tensors, folder / "d.safetensors", {"format": "pt"})


def save_pipeline(folder: Path, seed: int) -> None:
    """A pipeline of two components, by names alone."""
    parts = {
        "unet": ("UNet2DConditionModel", "diffusion_pytorch_model", "diffusers"),
        "text_encoder": ("CLIPTextModel", "model", "transformers"),
    }
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline"} | {name: [part[2], part[0]] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    for number, (name, (cls, file, _)) in enumerate(parts.items()):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"_class_name": cls, "architectures": [cls]}))
        tensors = {"conv_in.weight": integers(seed + number, 4, 4, 3, 3) / 8, "conv_in.bias": integers(seed, 4) / 8}
        if name == "unet":
            tensors |= {f"{BLOCK}.{leaf}.weight": integers(seed + 7, WIDTH, WIDTH) / 8 for leaf in ("to_q", "to_k")}
        save_file(tensors, folder / name / f"{file}.safetensors", {"format": "pt"})


def make_models(folder: Path) -> None:
    """Make all models, in the folder."""
    base = base_model()
    tuned = {name: fine_tune(base, seed) for seed, name in enumerate(("one", "two", "three", "four"), 1)}
    save(folder / "base", base)
    for name, tensors in tuned.items():
        save(folder / name, tensors)
        save(folder / f"{name}-sharded", tensors, shards=3)
    save_file(tuned["one"], folder / "one.safetensors", {"format": "pt"})
    save_file(tuned["two"], folder / "two.safetensors", {"format": "pt"})
    half = {name: {key: value.bfloat16() for key, value in tensors.items()} for name, tensors in tuned.items()}
    save(folder / "base-half", {key: value.bfloat16() for key, value in base.items()})
    save(folder / "one-half", half["one"])
    save(folder / "two-half", half["two"])
    fewer = {key: value for key, value in tuned["two"].items() if "layers.1.self_attn" not in key}
    save(folder / "fewer", fewer)
    save(folder / "longer", fine_tune(base_model(VOCABULARY + 2), 5), vocab_size=VOCABULARY + 2)
    codes = {key: value for key, value in half["one"].items() if "mlp.up_proj" not in key}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        codes |= {name: integers(layer, 2 * WIDTH, WIDTH).to(torch.float8_e4m3fn)}
        codes |= {f"{name}_scale_inv": torch.full((1, 1), 0.25)}
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    save(folder / "fp8", codes, quantization_config=stated)
    save_adapters(folder)
    save_diffusion_loras(folder)
    save_pipeline(folder / "pipeline", 9000)
    save_pipeline(folder / "pipeline2", 9100)
