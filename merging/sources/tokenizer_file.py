"""A model's tokenizer as its files state it: the row of each token, and the rules that split texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging.errors import FormatError, InputError
from merging.sources.small_files import LIST_LIMIT, is_there, read_json
from merging.sources.tokenizers import tokens_in, tokens_of

__all__ = ["Tokenizer", "read_tokenizer"]

_UNREADABLE = {
    "tekken.json": "Tekken",
    "*.tiktoken": "tiktoken",
    "tokenizer.model": "SentencePiece",
    "tokenizer.model.v*": "SentencePiece",
    "spiece.model": "SentencePiece",
    "sentencepiece*.model": "SentencePiece",
    "*.spm": "SentencePiece",
}
"""Files of tokenizers that no tokenizer.json can be made of here, and their kinds."""


_MOST = 1 << 24
"""The largest number of rows; some vocabularies have a million."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A tokenizer.

    Attributes:
        name: The name of its model, for messages.
        tokens: The row of each token.
        added: The tokens that are found before a text is split, with their flags, as tokenizer.json has them.
        content: The content of tokenizer.json; empty where the tokens are known from vocab.json or vocab.txt.
    """

    name: str
    tokens: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Mapping[str, Any]:
        """The part of tokenizer.json about the vocabulary and its merges."""
        model: Mapping[str, Any] = self.content.get("model") or {}
        return model

    @property
    def kind(self) -> str:
        """The kind of the model: BPE, WordPiece, Unigram or WordLevel."""
        if isinstance(self.model.get("type"), str):
            return str(self.model["type"])
        if isinstance(self.model.get("vocab"), list):
            return "Unigram"
        return "BPE" if "merges" in self.model else "WordPiece"


def read_tokenizer(folder: Path | None, name: str) -> Tokenizer:
    """Read the tokenizer of a model's folder.

    Raises:
        InputError: The folder has none, or one of a kind whose tokens cannot be read; it is named.
        FormatError: A file has another content than its name says.
    """
    path = folder / "tokenizer.json" if folder else None
    content = read_json(path, LIST_LIMIT) if path and is_there(path) else {}
    if path and content:
        _check_content(content, path)
    tokens = tokens_in(content, path) if path and content else tokens_of(folder) if folder else None
    if folder is None or tokens is None:
        kind = next((kind for pattern, kind in _UNREADABLE.items() if folder and any(folder.glob(pattern))), None)
        if kind:
            raise InputError(
                f"{name}: its tokenizer is of the kind {kind} alone, which cannot be matched by token: load it with "
                f"the program it is made for, and save it as a tokenizer.json"
            )
        raise InputError(f"{name}: has no tokenizer, so its rows cannot be matched by token: add its tokenizer.json")
    added = {each["content"]: each for each in content.get("added_tokens") or ()}
    own = {token: row for row, token in tokens.items()}
    if len(own) < len(tokens):  # a token with two rows has the row of its added token, else the first one
        own = {token: row for row, token in sorted(tokens.items(), reverse=True)}
        own |= {token: each["id"] for token, each in added.items()}
    strange = next((row for row in own.values() if not 0 <= row < _MOST), None)
    if strange is not None:
        raise FormatError(f"{folder}: its tokenizer gives a token the row {strange}, which no embedding has")
    return Tokenizer(name, own, added, content)


def _check_content(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer.json whose lists are not as the format has them.

    Raises :class:`~merging.errors.FormatError`.
    """
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise FormatError(f"{path}: has no model with a vocabulary")
    added, merges = content.get("added_tokens") or [], model.get("merges") or []
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise FormatError(f"{path}: its added_tokens are not a list of tokens with their ids")
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        raise FormatError(f"{path}: its merges are not a list of pairs of texts")
    if isinstance(model["vocab"], list) and not all(map(_is_piece, model["vocab"])):
        raise FormatError(f"{path}: its vocabulary is not a list of pieces with their scores")


def _is_added_token(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str) and type(value.get("id")) is int


def _is_merge(value: object) -> bool:
    if isinstance(value, str):
        return " " in value
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _is_piece(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return isinstance(value[0], str) and isinstance(value[1], (int, float))
