"""Tiny dense language models with a tokenizer, as folders: what mixtures of experts are made of."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["WORDS", "build_dense", "save_dense", "tokenizer"]

WORDS = [
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "plus", "minus", "times",
    "is", "the", "cat", "dog", "bird", "fish", "sat", "ran", "flew", "swam", "on", "in", "over", "mat",
    "park", "sky", "sea", "and", "a", "small", "big", "def", "return", "import", "class", "self", "print",
    "list", "dict", "x", "y", "z",
]  # fmt: skip
"""The vocabulary, behind the special tokens."""

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gpt2": ("GPT2", {}),
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words, which puts <s> first."""
    rows = {token: row for row, token in enumerate([*_SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(rows, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="")
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", rows["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def build_dense(kind: str = "llama", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model of a type with random numbers, biases among them."""
    title, own = _TYPES[kind]
    config = getattr(transformers, f"{title}Config")(
        vocab_size=len(_SPECIAL) + len(WORDS), **{**_SHAPE, **own, **settings}
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{title}{'LMHeadModel' if kind == 'gpt2' else 'ForCausalLM'}")(
        config
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_dense(
    folder: Path, kind: str = "llama", seed: int = 0, model: PreTrainedModel | None = None, **settings: Any
) -> Path:
    """The folder of a model: its weights, config and tokenizer."""
    made = model if model is not None else build_dense(kind, seed, **settings)
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
