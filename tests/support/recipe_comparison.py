"""How an output of ours differs from the peer's: in tensors, in config.json, and in the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from support.tiny import load

__all__ = ["compare_files", "compare_values"]

FLOAT32 = 1e-6
"""The largest difference of float32 arithmetic from float64, of numbers up to 1."""

ROUNDING = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance of neighbors, relative to the smaller of them."""

IGNORED = {"transformers_version", "_name_or_path"}

TEXTS = (
    "The ships write short stories, and 7 rivers answer.",
    "def add(x, y):\n    return x + y  # <|im_start|>user\nfifty-six<|im_end|>",
    "<s>Es war einmal 北京</s> lighthouse SELECT price; <|turn|>",
)
"""Words, code, special tokens, and bytes that no text of the training had."""


def compare_values(ours: Path, exact: Path) -> Iterator[str]:
    """Yield ``values: TENSOR`` for each tensor that is not the exact one rounded once to its type.

    Rows of tables are compared by their tokens where the two outputs number them differently.
    """
    mine, theirs = load(ours), load(exact)
    rows = _common_rows(ours, exact)
    for name in sorted(mine.keys() & theirs.keys()):
        got, wanted = mine[name], theirs[name].double()
        if rows and wanted.dim() == 2 and name.endswith(TABLES):
            got, wanted = (values[torch.tensor(order)] for values, order in zip((got, wanted), rows, strict=True))
        if got.shape == wanted.shape and not _is_close(got, wanted):
            yield f"values: {name}"


TABLES = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "shared.weight")


def _is_close(got: Tensor, wanted: Tensor) -> bool:
    slack = ROUNDING[got.dtype] * wanted.abs() + FLOAT32
    return bool(((got.double() - wanted).abs() <= slack).all())


def _common_rows(ours: Path, theirs: Path) -> tuple[list[int], list[int]] | None:
    """Return the rows of the same tokens in both outputs; None without two tokenizers."""
    mine, other = _tokenizer(ours), _tokenizer(theirs)
    if mine is None or other is None:
        return None
    vocabulary, numbers = mine.get_vocab(), other.get_vocab()
    common = sorted(vocabulary.keys() & numbers.keys())
    return [vocabulary[token] for token in common], [numbers[token] for token in common]


def compare_files(ours: Path, theirs: Path) -> Iterator[str]:
    """Yield what differs in names, shapes and types of tensors, in configs, and in the tokenizer."""
    yield from _compare_headers(load(ours), load(theirs))
    for file in ("config.json", "generation_config.json"):
        yield from _compare_json(file, _read(ours / file), _read(theirs / file))
    mine, other = _tokenizer(ours), _tokenizer(theirs)
    if mine is None or other is None:
        if mine is not other:
            yield f"tokenizer: only {'the peer' if mine is None else 'ours'} has one"
        return
    yield from _compare_tokenizers(mine, other)


def _compare_headers(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"missing: {name}" for name in sorted(theirs.keys() - mine.keys()))
    yield from (f"extra: {name}" for name in sorted(mine.keys() - theirs.keys()))
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name].shape != theirs[name].shape:
            yield f"shape: {name}: {tuple(mine[name].shape)}, and {tuple(theirs[name].shape)} of the peer"
        if mine[name].dtype != theirs[name].dtype:
            yield f"dtype: {name}: {mine[name].dtype}, and {theirs[name].dtype} of the peer"


def _read(file: Path) -> dict[str, Any]:
    """Return a config. Older versions of transformers have the type under another name, which we write as well."""
    config = json.loads(file.read_text()) if file.exists() else {}
    if config.get("dtype") == config.get("torch_dtype"):
        config.pop("torch_dtype", None)
    return config


def _compare_json(file: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key in sorted((mine.keys() | theirs.keys()) - IGNORED):
        one, other = mine.get(key), theirs.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _compare_json(file, one, other, f"{above}{key}.")
        elif one != other:
            yield f"{file}: {above}{key}: {one!r}, and {other!r} of the peer"


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    return AutoTokenizer.from_pretrained(str(folder)) if (folder / "tokenizer_config.json").exists() else None


CHATS = (
    [{"role": "user", "content": "Which ship?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which ship?"},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "Why?"},
    ],
)


def _render(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what the chat template makes of the chats, with and without a prompt for the answer."""
    if tokenizer.chat_template is None:
        return []
    return [
        str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
        for chat in CHATS
        for prompt in (False, True)
    ]


def _compare_tokenizers(mine: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> Iterator[str]:
    vocabulary, other = mine.get_vocab(), theirs.get_vocab()
    if vocabulary.keys() != other.keys():
        lost, new = sorted(other.keys() - vocabulary.keys()), sorted(vocabulary.keys() - other.keys())
        yield f"tokenizer: tokens: without {lost[:5]}, with {new[:5]}"
    elif vocabulary != other:
        moved = [token for token, number in vocabulary.items() if other[token] != number]
        yield f"tokenizer: ids: of {len(moved)} tokens, such as {moved[:3]}"
    if dict(mine.special_tokens_map) != dict(theirs.special_tokens_map):
        yield f"tokenizer: special tokens: {mine.special_tokens_map}, and {theirs.special_tokens_map} of the peer"
    one, two = _render(mine), _render(theirs)
    if one != two:
        yield f"tokenizer: chat template: {one}, and {two} of the peer"
    for text in TEXTS:
        one, two = (each.convert_ids_to_tokens(each(text)["input_ids"]) for each in (mine, theirs))
        if one != two:
            yield f"tokenizer: encoding: {one}, and {two} of the peer"
