"""A tokenizer with the tokens of others: tokenizer.json and tokenizer_config.json are extended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.errors import InputError
from merging.sources.tokenizer_file import Tokenizer

__all__ = ["RebuiltTokenizer", "rebuild_tokenizer"]

_KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}

_FAR = 10.0
"""How far below the least likely piece of a Unigram model pieces are that no text should be split into."""


@dataclass(frozen=True, slots=True, eq=False)
class RebuiltTokenizer:
    """The content of a tokenizer.json, the tokens added to the source's, and remarks for people."""

    content: dict[str, Any]
    added: dict[int, dict[str, Any]]
    notices: tuple[str, ...]

    def config(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return tokenizer_config.json with the added tokens, where it lists such tokens."""
        listed = given.get("added_tokens_decoder")
        if not isinstance(listed, dict):
            return dict(given)
        more = {str(row): {key: flags[key] for key in ("content", *_FLAGS)} for row, flags in self.added.items()}
        return {**given, "added_tokens_decoder": {**listed, **more}}


def rebuild_tokenizer(
    source: Tokenizer, others: Sequence[Tokenizer], tokens: Mapping[str, int]
) -> RebuiltTokenizer | None:
    """Extend a tokenizer to more tokens.

    The source's tokens, rules and merges stay as they are, so that they come first where a text can be split in several
    ways. Merges and scores of other tokenizers are appended where their pieces are written in the same alphabet.

    Args:
        source: the tokenizer to extend.
        others: the tokenizers that have the further tokens.
        tokens: the row of each token of the output.

    Returns:
        The tokenizer, None if the source itself is the output's.

    Raises:
        InputError: for a tokenizer that is not of a kind that can be extended.
    """
    if tokens.keys() == source.tokens.keys() and not source.content:
        return None
    if source.kind not in _KINDS or not source.content:
        stated = f"of the kind {source.kind}" if source.content else "without a tokenizer.json"
        raise InputError(
            f"{source.name}: a tokenizer {stated} cannot be extended by further tokens: load it with transformers and "
            f"save it as a tokenizer.json, or use the tokens of one model"
        )
    extension = _Extension(source, tokens)
    for other in others:
        extension.extend(other)
    return extension.finish()


class _Extension:
    """A copy of a tokenizer's content, while tokens are added to it."""

    def __init__(self, source: Tokenizer, tokens: Mapping[str, int]) -> None:
        self._source, self._tokens = source, tokens
        self._content: dict[str, Any] = {**source.content, "model": dict(source.model)}
        self._pieces: dict[str, float] = {}  # further pieces of the model, with their scores
        self._added: dict[int, dict[str, Any]] = {}
        self._notices: list[str] = []

    def extend(self, other: Tokenizer) -> None:
        """Add the tokens of another tokenizer that the source and former ones lack."""
        known = {self._content_of(flags) for flags in self._added.values()} | self._source.added.keys()
        for token, flags in other.added.items():
            # A token that the source has as an ordinary piece is found before splitting only if it is a special one.
            missing = token in self._tokens and token not in known
            if missing and (token not in self._source.tokens or flags.get("special")):
                self._add(token, flags)
        further = self._tokens.keys() - self._source.tokens.keys() - other.added.keys()
        new = [token for token in other.tokens if token in further]
        alike = other.kind == self._source.kind and _alphabet(other) == _alphabet(self._source)
        scores = dict(_scores(other)) if alike else {}
        self._pieces |= {token: scores.get(token, 0.0) for token in new if token not in self._pieces}
        self._merge(other, len(new), alike)

    def _merge(self, other: Tokenizer, new: int, alike: bool) -> None:
        """Append the merges of another BPE tokenizer, and note tokens that no text is split into."""
        if not new:
            return
        if not alike:
            self._notices.append(
                f"{new} tokens of {other.name} have rows, but no text is split into them: its tokenizer ({other.kind}) "
                f"spells tokens in another way than the tokenizer of {self._source.name} ({self._source.kind})"
            )
        elif self._source.kind == "BPE":
            model, known = self._content["model"], {*self._source.tokens, *self._pieces}
            merges = dict.fromkeys(map(_pair, model.get("merges") or ()))
            further = dict.fromkeys(map(_pair, other.model.get("merges") or ()))
            merges |= {pair: None for pair in further if {*pair, "".join(pair)} <= known}
            model["merges"] = list(map(list, merges))
        if alike and _rules(other) != _rules(self._source):
            self._notices.append(
                f"the tokenizers of {other.name} and {self._source.name} prepare texts in different ways: the output "
                f"does it as {self._source.name} does, and may split a text in another way than {other.name} does"
            )

    def _add(self, token: str, flags: Mapping[str, Any]) -> None:
        row = self._tokens[token]
        self._added[row] = {"id": row, "content": token, **{key: bool(flags.get(key)) for key in _FLAGS}}

    @staticmethod
    def _content_of(flags: Mapping[str, Any]) -> str:
        return str(flags["content"])

    def finish(self) -> RebuiltTokenizer | None:
        """Return the tokenizer, None if nothing was added."""
        named = set(self._tokens) - self._source.tokens.keys() - self._pieces.keys()
        for token in named - {self._content_of(flags) for flags in self._added.values()}:
            self._add(token, {})  # a token that only the settings have
        if not self._added and not self._pieces:
            return None
        listed = self._content.get("added_tokens") or []
        added = sorted([*listed, *self._added.values()], key=lambda flags: int(flags["id"]))
        self._content["added_tokens"] = added
        if self._pieces:  # else the further tokens follow the added tokens, whose rows are counted on
            self._extend_model([self._content_of(flags) for flags in added])
        return RebuiltTokenizer(self._content, dict(sorted(self._added.items())), tuple(self._notices))

    def _extend_model(self, added: Sequence[str]) -> None:
        """Put all tokens into the model's own vocabulary, as only there their rows are stated."""
        model = self._content["model"]
        rows = {token: self._tokens[token] for token in (*added, *self._pieces)}
        if self._source.kind != "Unigram":
            model["vocab"] = dict(sorted({**rows, **model["vocab"]}.items(), key=lambda each: int(each[1])))
            return
        pieces = model["vocab"] = list(model["vocab"])
        lowest = min((score for _, score in pieces), default=0.0) - _FAR
        by_row = {row: token for token, row in rows.items()}
        for row in range(len(pieces), max(rows.values()) + 1):
            token = by_row.get(row, f"<row {row}>")
            pieces.append([token, self._pieces.get(token) or lowest])


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two parts of a merge, in either form of the file."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _scores(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    vocabulary = tokenizer.model.get("vocab")
    return [(str(token), float(score)) for token, score in vocabulary] if isinstance(vocabulary, list) else []


def _alphabet(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return how a tokenizer's pieces spell texts: in the signs of bytes, or spaces as another sign, and affixes."""
    parts = str([tokenizer.content.get(part) for part in ("pre_tokenizer", "decoder", "normalizer")])
    signs = "bytes" if "'ByteLevel'" in parts else "spaces as signs" if "▁" in parts else "plain"
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    return (signs, *(str(tokenizer.model.get(affix) or "") for affix in affixes))


def _rules(tokenizer: Tokenizer) -> list[Any]:
    """Return the rules that a tokenizer prepares texts by before it splits words."""
    return [tokenizer.content.get("normalizer"), tokenizer.content.get("pre_tokenizer")]
