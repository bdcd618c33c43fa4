"""Tiny models with real tokenizers of several kinds, trained on a few sentences of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)

__all__ = ["EMBEDDING", "HEAD", "KINDS", "rows_of", "save_model", "save_tokenized", "tokenizer_of", "tokens_of_file"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

SENTENCES = {
    "a": ["the cat sat on the mat", "hello world of cats", "merge the models now"] * 5,
    "b": ["zebra quantum entanglement", "the quick brown fox jumps", "merge tokenizers zebra quantum"] * 5,
    "c": ["der hund und die katze", "das ist ein haus", "merge der katze"] * 5,
}
KINDS = ("bytes", "qwen2", "llama", "gemma", "bert", "t5")


def _bytes_model(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[name], trainer)
    return tokenizer


def _fallback_model(name: str, special: list[str]) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    listed = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=listed, show_progress=False)
    tokenizer.train_from_iterator(["▁" + text for text in SENTENCES[name]], trainer)
    return _model(tokenizer)


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def tokenizer_of(kind: str, name: str, special: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, trained on the sentences of a name, with special tokens of its own."""
    made: Any
    if kind == "bytes":
        backend = _bytes_model(name)
        backend.add_special_tokens(["<s>", "</s>"])
        made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    elif kind == "qwen2":
        model = _model(_bytes_model(name))
        made = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    elif kind in ("llama", "gemma"):
        cls, first = (LlamaTokenizer, ["<unk>", "<s>", "</s>"]) if kind == "llama" else (GemmaTokenizer, [])
        model = _fallback_model(name, first or ["<pad>", "<eos>", "<bos>", "<unk>"])
        made = cls(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    elif kind == "bert":
        pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        pieces.pre_tokenizer, pieces.normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
        listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces.train_from_iterator(
            SENTENCES[name], trainers.WordPieceTrainer(vocab_size=100, special_tokens=listed, show_progress=False)
        )
        made = BertTokenizer(vocab=_model(pieces)["vocab"])
    else:
        unigram = Tokenizer(models.Unigram())
        unigram.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
        unigram.train_from_iterator(SENTENCES[name] * 10, trainer)
        made = T5Tokenizer(vocab=[tuple(piece) for piece in _model(unigram)["vocab"]], extra_ids=5)
    made.add_tokens(special, special_tokens=True)
    return made


def save_model(folder: Path, rows: int, seed: int, **config: Any) -> Path:
    """A Llama of random weights with a vocabulary of this size."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, **heads}
    whole = LlamaConfig(vocab_size=rows, **{**sizes, **config})
    LlamaForCausalLM(whole).save_pretrained(folder)
    return folder


def save_tokenized(
    folder: Path, name: str, kind: str = "bytes", special: list[str] | None = None, padding: int = 0, **config: Any
) -> Path:
    """A model with a tokenizer; ``padding`` is the number of rows behind its last token."""
    tokenizer = tokenizer_of(kind, name, [f"<|{name}|>"] if special is None else special)
    rows = max(tokenizer.get_vocab().values()) + 1 + padding
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    save_model(folder, rows, sorted(SENTENCES).index(name), **ids, **config)
    tokenizer.save_pretrained(folder)
    return folder


def tokens_of_file(folder: Path) -> dict[str, int]:
    """The row of each token, as the tokenizers library reads the file."""
    rows: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return rows


def rows_of(folder: Path, table: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """The row of each token as numbers."""
    values = load_file(folder / "model.safetensors")[table]
    return {token: values[row] for token, row in tokens_of_file(folder).items()}
