"""GGUF files of tiny models, written by the package gguf under the names that it has for transformers' tensors."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["ARCHITECTURE", "permute", "write_gguf", "write_gguf_lora"]

ARCHITECTURE = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "granite": "granite", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
    "gpt2": "gpt2", "olmo2": "olmo2", "cohere": "command-r",
}  # fmt: skip
"""llama.cpp's architectures by transformers' types of models."""

STACKED = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def permute(weight: Tensor, heads: int) -> Tensor:
    """Queries or keys as llama.cpp's converter orders their rows."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _layout(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as llama.cpp's converter changes them, experts stacked."""
    kind = config["model_type"]
    found: dict[str, Tensor] = {}
    experts: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        parts = name.split(".")
        if "experts" in parts and parts[-2] in STACKED:
            place = parts.index("experts")
            experts[".".join([*parts[: place + 1], *parts[place + 2 :]])][int(parts[place + 1])] = value
            continue
        if ARCHITECTURE[kind] in ("llama", "granite") and parts[-2] in ("q_proj", "k_proj"):
            value = permute(value, config["num_attention_heads" if parts[-2] == "q_proj" else "num_key_value_heads"])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if kind == "gpt2" and parts[-2] in ("c_attn", "c_proj", "c_fc") and parts[-1] == "weight":
            value = value.T
        found[name] = value
    stacks = {name: torch.stack([parts[each] for each in sorted(parts)]) for name, parts in experts.items()}
    return found | stacks


def _numbers(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config.get("max_position_embeddings") or config["n_positions"])
    writer.add_embedding_length(config.get("hidden_size") or config["n_embd"])
    writer.add_block_count(config.get("num_hidden_layers") or config["n_layer"])
    writer.add_feed_forward_length(config.get("intermediate_size") or 4 * config["n_embd"])
    writer.add_head_count(config.get("num_attention_heads") or config["n_head"])
    writer.add_vocab_size(config["vocab_size"])
    for name, add in {
        "num_key_value_heads": writer.add_head_count_kv,
        "rms_norm_eps": writer.add_layer_norm_rms_eps,
        "layer_norm_eps": writer.add_layer_norm_eps,
        "layer_norm_epsilon": writer.add_layer_norm_eps,
        "head_dim": writer.add_key_length,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
        "num_experts_per_tok": writer.add_expert_used_count,
        "num_local_experts": writer.add_expert_count,
        "num_experts": writer.add_expert_count,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "logit_scale": writer.add_logit_scale,
    }.items():
        if config.get(name) is not None:
            add(config[name])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    width = config.get("head_dim") or (config.get("hidden_size") or config["n_embd"]) // (
        config.get("num_attention_heads") or config["n_head"]
    )
    writer.add_rope_dimension_count(width)
    for name, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if config.get(name) is not None:
            add(config[name])


def _tokens(writer: gguf.GGUFWriter, size: int) -> None:
    """A tokenizer of letters, as SentencePiece's models are written."""
    tokens = ["<unk>", "<s>", "</s>", *(f"\u2581{letter}" for letter in "abcdefghij")]
    tokens += [chr(ord("a") + number) for number in range(26)]
    tokens += [f"[PAD{number}]" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types([2, 3, 3, *(1 for _ in range(size - 3))])


def write_gguf(
    path: Path,
    folder: Path,
    kind: str = "F32",
    *,
    shard_tensors: int = 0,
    more: dict[str, np.ndarray] | None = None,
    template: str | None = None,
) -> Path:
    """Write the model of a folder; its matrices, but for embeddings, are of a ``kind`` of ggml where rows allow it."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURE[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=shard_tensors)
    writer.add_type(gguf.GGUFType.MODEL)
    _numbers(writer, config)
    _tokens(writer, config["vocab_size"])
    if template is not None:
        writer.add_chat_template(template)
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.get("num_hidden_layers") or config["n_layer"])
    for name, value in _layout(config, load_file(folder / "model.safetensors")).items():
        written = names.get_name(name, (".weight", ".bias"))
        assert written is not None, name
        fits = value.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0
        matrix = value.dim() > 1 and "embd" not in written and fits
        qtype = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        data = np.ascontiguousarray(value.float().numpy())
        if qtype == gguf.GGMLQuantizationType.BF16:
            data = value.bfloat16().view(torch.uint8).numpy()
        elif qtype != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(data, qtype)
        writer.add_tensor(written, data, raw_dtype=qtype)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf_lora(path: Path, folder: Path, base: Path, heads: bool = False) -> Path:
    """Write the LoRA that PEFT saved in a folder, as llama.cpp's converter lays it out; ``heads``: state their number.

    Of GPT-2's transposed layers the factors are laid out as its server multiplies them, which its converter does not.
    """
    config = json.loads((base / "config.json").read_text())
    stated = json.loads((folder / "adapter_config.json").read_text())
    arch = ARCHITECTURE[config["model_type"]]
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.get("num_hidden_layers") or config["n_layer"])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(stated["lora_alpha"]))
    if heads:
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
    stacks: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    saved = load_file(folder / "adapter_model.safetensors")
    for name, value in ((name, saved[name]) for name in saved if ".lora_" in name):
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        factor = "b" if name.rpartition(".lora_")[2].startswith(("B", "embedding_B")) else "a"
        parts = module.split(".")
        if factor == "b" and arch in ("llama", "granite") and parts[-1] in ("q_proj", "k_proj"):
            value = permute(value, config["num_attention_heads" if parts[-1] == "q_proj" else "num_key_value_heads"])
        if factor == "a" and parts[-1] in ("embed_tokens", "wte"):
            value = value.T
        if "experts" in parts:
            place = parts.index("experts")
            stack = names.get_name(".".join([*parts[: place + 1], *parts[place + 2 :]]))
            stacks[f"{stack}.weight.lora_{factor}"][int(parts[place + 1])] = value
            continue
        writer.add_tensor(f"{names.get_name(module)}.weight.lora_{factor}", np.ascontiguousarray(value.float().numpy()))
    for name, each in stacks.items():
        writer.add_tensor(name, torch.stack([each[number] for number in sorted(each)]).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
