"""Tokens of the embedding's rows, as a tokenizer's files state them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.small_files import LIST_LIMIT, is_there, read_json, read_text

__all__ = ["TOKENIZER_FILES", "token_conflict", "tokens_in", "tokens_of"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "*_vocab.json",
    "vocab-*.json",
    "merges.txt",
    "vocab.txt",
    "dict.txt",
    "bpe.codes",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "spm*.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "prophetnet.tokenizer",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "word_pronunciation.json",
    "word_shape.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Patterns of the files of tokenizers."""


def tokens_of(folder: Path) -> dict[int, str] | None:
    """Return the tokens by row, None if the folder has no tokenizer of a known kind.

    Known are ``tokenizer.json``, ``vocab.json`` and ``vocab.txt``, the latter two with ``added_tokens.json``. Raises
    :class:`~merging.errors.FormatError` for files of another content.
    """
    if is_there(folder / "tokenizer.json"):
        path = folder / "tokenizer.json"
        return tokens_in(read_json(path, LIST_LIMIT), path)
    if is_there(folder / "vocab.json"):
        tokens = _read_vocabulary(folder / "vocab.json")
    elif is_there(folder / "vocab.txt"):
        lines = read_text(folder / "vocab.txt", LIST_LIMIT, errors="replace").split("\n")
        tokens = {row: token.rstrip("\r") for row, token in enumerate(lines) if token}
    else:
        return None
    added = folder / "added_tokens.json"
    return tokens | _read_vocabulary(added) if is_there(added) else tokens


def tokens_in(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Return the tokens by row in the content of a ``tokenizer.json``; ``path`` is its place for errors."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[int, str] = {}
    if isinstance(vocabulary, dict):
        tokens = _by_row(vocabulary, path)
    elif isinstance(vocabulary, list):  # a unigram model: tokens with their scores
        tokens = {row: str(entry[0]) for row, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    listed = content.get("added_tokens")
    for added in listed if isinstance(listed, list) else []:
        if isinstance(added, dict) and type(added.get("id")) is int:
            tokens[added["id"]] = str(added.get("content"))
    return tokens


def _read_vocabulary(path: Path) -> dict[int, str]:
    return _by_row(read_json(path, LIST_LIMIT), path)


def _by_row(vocabulary: Mapping[str, Any], path: Path) -> dict[int, str]:
    if not all(type(row) is int for row in vocabulary.values()):
        raise FormatError(f"{path}: should give each token its row")
    return {row: token for token, row in vocabulary.items()}


def token_conflict(one: Mapping[int, str], other: Mapping[int, str]) -> int | None:
    """Return the first row that has different tokens in two tokenizers, None if there is none."""
    return min((row for row in one.keys() & other.keys() if one[row] != other[row]), default=None)
