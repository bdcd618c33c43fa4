"""The config.json of a model in a GGUF file, rebuilt from its metadata and the shapes of its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from merging.errors import FormatError
from merging.sources.gguf.architectures import Architecture
from merging.sources.stored import Stored

__all__ = ["heads_of", "rebuild_config"]

_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
"""The fields that most architectures have, by the keys of the metadata without the architecture's name."""

_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_LARGE_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""The blocks of the models of 27 billion parameters, by which llama.cpp knows how they scale queries."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The numbers of Llama 3's scaling that files do not state; every published model has them."""


def rebuild_config(
    architecture: Architecture,
    metadata: Mapping[str, str],
    tensors: Mapping[str, Stored],
    *,
    dtype_name: str,
    where: str,
) -> dict[str, Any]:
    """Return the fields of config.json.

    Args:
        architecture: The architecture.
        metadata: The metadata of the file.
        tensors: The tensors by their names in the file.
        dtype_name: The type in which most of them are read.
        where: The file, for messages.

    Raises:
        FormatError: for metadata that lack a number that the model needs, or that cannot be expressed.
    """
    facts = _Facts(metadata, where)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{where}: has no token embedding (token_embd.weight), so it is not a whole language model")
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "dtype": _DTYPES[dtype_name],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "pad_token_id": None,
        **architecture.constants,
    }
    usual = {} if architecture.model_type == "gpt2" else _FIELDS
    for key, name in {**usual, **architecture.fields}.items():
        value = facts.number(key)
        if value is not None:
            config[name] = value
    for key, name in _TOKENS.items():
        value = facts.parse(metadata.get(key))
        if isinstance(value, int):
            config[name] = value
    for name in ("num_attention_heads", "num_hidden_layers"):
        short = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}[name]
        if not config.get(name if usual else short):
            raise FormatError(f"{where}: its metadata do not state the model's {name}, so that no config can be made")
    config |= _biases(architecture, tensors)
    if architecture.model_type in _LARGE_GEMMA:
        large = config["num_hidden_layers"] == _LARGE_GEMMA[architecture.model_type]
        mean = config.get("hidden_size", 0) // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = mean if large else config.get("head_dim", 256)
    config |= _rope(architecture, facts, tensors, config)
    return config


def heads_of(config: Mapping[str, Any], module: str) -> int:
    """Return the number of heads in queries (``attn_q``) or keys (``attn_k``)."""
    heads = config.get("num_attention_heads")
    if module == "attn_k":
        heads = config.get("num_key_value_heads") or heads
    return heads if isinstance(heads, int) else 0


class _Facts:
    """The numbers of the architecture in the metadata."""

    def __init__(self, metadata: Mapping[str, str], where: str) -> None:
        self.name = metadata.get("general.architecture", "")
        self._metadata, self._where = metadata, where

    def text(self, key: str) -> str | None:
        return self._metadata.get(f"{self.name}.{key}")

    def number(self, key: str) -> int | float | None:
        """Return a number; of a list, its value if all blocks have the same."""
        value = self.parse(self.text(key))
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if isinstance(value, list):
            raise FormatError(f"{self._where}: its blocks have different numbers of {key}, which is not read")
        if isinstance(value, float) and math.isfinite(value):
            return float(f"{value:.7g}")  # float32: the shortest number with the same value to its precision
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    def parse(self, text: str | None) -> Any:
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError):
            return None


def _biases(architecture: Architecture, tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the fields that say which projections have biases, by the names in the first block."""
    found: dict[str, Any] = {}
    if architecture.model_type in ("llama", "granite", "olmo2", "cohere", "nemotron"):
        found["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if architecture.model_type in ("llama", "granite", "nemotron"):
        found["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if architecture.model_type == "cohere":
        found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    if architecture.model_type == "starcoder2":
        found["use_bias"] = "blk.0.attn_q.bias" in tensors
    return found


def _rope(
    architecture: Architecture, facts: _Facts, tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how positions are scaled, and which part of a head is rotated."""
    found: dict[str, Any] = {}
    rotated, heads = facts.number("rope.dimension_count"), config.get("num_attention_heads")
    width = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else None)
    if rotated and width and architecture.model_type in ("phi3", "nemotron") and rotated != width:
        found["partial_rotary_factor"] = rotated / width
    if rotated and architecture.model_type in ("llama", "mixtral") and "head_dim" not in config:
        found["head_dim"] = rotated
    kind, factor = facts.text("rope.scaling.type"), facts.number("rope.scaling.factor")
    original = facts.number("rope.scaling.original_context_length")
    if "rope_freqs.weight" in tensors:
        found["rope_scaling"] = _llama3(tensors["rope_freqs.weight"], facts, config, width)
    elif "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        long, short = (tensors[f"rope_factors_{each}.weight"] for each in ("long", "short"))
        if max(long.numel, short.numel) > 1 << 12:
            raise FormatError(f"{facts._where}: its rope factors are too many to be a head's")
        found["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": [float(f"{each:.7g}") for each in long.read().flatten().tolist()],
            "short_factor": [float(f"{each:.7g}") for each in short.read().flatten().tolist()],
        }
    elif kind in ("linear", "yarn") and factor:
        found["rope_scaling"] = {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn" and original:
            found["rope_scaling"]["original_max_position_embeddings"] = original
    if config.get("sliding_window") == 0:
        found["sliding_window"] = None
    if original and architecture.model_type == "phi3":
        found["original_max_position_embeddings"] = original
    return found


def _llama3(factors: Stored, facts: _Facts, config: Mapping[str, Any], width: int | None) -> dict[str, Any]:
    """Return Llama 3's scaling, which files hold as the factor of each frequency.

    Raises :class:`~merging.errors.FormatError` for other factors.
    """
    stated = factors.read().flatten().tolist() if factors.numel < 1 << 12 else []
    theta = config.get("rope_theta", 10000.0)
    factor = max(stated, default=0.0)
    original = facts.number("rope.scaling.original_context_length")
    for context in (original, _LLAMA3["original_max_position_embeddings"]):
        numbers = _LLAMA3 | {"original_max_position_embeddings": context}
        if context and width and len(stated) == width // 2:
            wanted = _llama3_factors(theta, width, factor, numbers)
            if all(abs(one - other) <= 1e-3 * abs(other) for one, other in zip(stated, wanted, strict=True)):
                return {"rope_type": "llama3", "factor": float(f"{factor:.7g}"), **numbers}
    raise FormatError(
        f"{facts._where}: scales its rotary frequencies in another way than Llama 3 (rope_freqs.weight), which "
        f"config.json cannot express"
    )


def _llama3_factors(theta: float, width: int, factor: float, numbers: Mapping[str, Any]) -> list[float]:
    context, low, high = (
        numbers[each] for each in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    found = []
    for place in range(0, width, 2):
        turns = context / (2 * math.pi * theta ** (place / width))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found
