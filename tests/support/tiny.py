"""Tiny synthetic checkpoints: named like a small language model, random, and on the disk in a few milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["CONFIG", "adapters", "checkpoint", "fine_tune", "identical", "load", "model", "save"]

CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}

Tensors = dict[str, Tensor]


def model(
    seed: int = 0, layers: int = 3, width: int = 8, vocab: int = 12, dtype: torch.dtype = torch.float32
) -> Tensors:
    """The tensors of a language model: an embedding, blocks of a matrix and a norm, a final norm, a head."""
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (2 * width, width)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def fine_tune(base: Mapping[str, Tensor], seed: int, size: float = 0.1) -> Tensors:
    """The same model with every floating-point tensor changed a little, each by its own random numbers."""
    random = torch.Generator().manual_seed(1000 + seed)

    def change(value: Tensor) -> Tensor:
        return (value.double() + size * torch.randn(value.shape, generator=random).double()).to(value.dtype)

    return {name: change(value) if value.is_floating_point() else value.clone() for name, value in base.items()}


def save(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = CONFIG, shards: int = 1
) -> Path:
    """A model's folder: one safetensors file or several with their index, and the config unless it is None."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def checkpoint(folder: Path, count: int = 2, **shape: Any) -> tuple[Path, list[Path]]:
    """A base and so many fine-tunes of it, in folders of their own."""
    base = model(**shape)
    tuned = [save(folder / f"tuned{i}", fine_tune(base, i)) for i in range(count)]
    return save(folder / "base", base), tuned


def load(path: Path) -> Tensors:
    """All tensors of a file or folder, none of which may be stored twice."""
    found: Tensors = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def identical(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names, types, shapes and every bit agree."""
    return one.keys() == other.keys() and all(_bits(value) == _bits(other[name]) for name, value in one.items())


def _bits(value: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def adapters(folder: Path, count: int) -> tuple[Path, list[Path]]:
    """A tiny base and adapters of it, of different ranks."""
    base, _ = checkpoint(folder, 0, layers=2, width=16)
    random_numbers = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        rank, tensors = 1 + number % 2, {}
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.mlp.up_proj"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 16, generator=random_numbers)
            tensors[f"{name}.lora_B.weight"] = torch.randn(32, rank, generator=random_numbers)
        adapter = folder / f"adapter{number}"
        adapter.mkdir()
        save_file(tensors, adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "base_model_name_or_path": "tiny/base"}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        made.append(adapter)
    return base, made
