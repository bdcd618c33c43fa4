"""Tokenizers as their files state them; damaged files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from merging.errors import FormatError, InputError
from merging.sources.tokenizer_file import read_tokenizer

VOCABULARY = {"a": 0, "b": 1, "ab": 2}
ADDED = [{"id": 3, "content": "<s>", "special": True}]


def tokenizer(folder: Path, model: Any, added: Any = ADDED) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    return folder


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ({"type": "BPE", "vocab": VOCABULARY, "merges": ["a b"]}, "BPE"),
        ({"vocab": VOCABULARY, "merges": [["a", "b"]]}, "BPE"),
        ({"vocab": VOCABULARY}, "WordPiece"),
        ({"vocab": [["a", -1.0], ["b", -2], ["ab", 0.0]]}, "Unigram"),
    ],
)
def test_kinds_and_rows(tmp_path: Path, model: Any, kind: str) -> None:
    read = read_tokenizer(tokenizer(tmp_path, model), "it")
    assert read.kind == kind
    assert read.tokens == VOCABULARY | {"<s>": 3}
    assert list(read.added) == ["<s>"]


def test_a_token_with_two_rows_has_the_row_of_its_added_token(tmp_path: Path) -> None:
    added = [{"id": 7, "content": "b"}]
    assert read_tokenizer(tokenizer(tmp_path, {"vocab": VOCABULARY}, added), "it").tokens == VOCABULARY | {"b": 7}


@pytest.mark.parametrize(
    ("model", "added", "words"),
    [
        (None, ADDED, "no model with a vocabulary"),
        ({"vocab": 3}, ADDED, "no model with a vocabulary"),
        ({"vocab": VOCABULARY, "merges": ["ab"]}, ADDED, "merges are not"),
        ({"vocab": VOCABULARY, "merges": [["a", 1]]}, ADDED, "merges are not"),
        ({"vocab": [["a"]]}, ADDED, "pieces with their scores"),
        ({"vocab": VOCABULARY}, [{"content": "<s>"}], "added_tokens are not"),
        ({"vocab": VOCABULARY}, {"<s>": 3}, "added_tokens are not"),
        ({"vocab": {"a": -1}}, ADDED, "gives a token the row -1"),
        ({"vocab": VOCABULARY}, [{"content": "<s>", "id": 1 << 40}], "gives a token the row 1099511627776"),
        ({"vocab": {"a": "0"}}, ADDED, "should give each token its row"),
    ],
)
def test_damaged_files(tmp_path: Path, model: Any, added: Any, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        read_tokenizer(tokenizer(tmp_path, model, added), "it")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tekken.json", "of the kind Tekken alone"),
        ("spiece.model", "of the kind SentencePiece alone"),
        ("qwen.tiktoken", "of the kind tiktoken alone"),
        ("nothing.txt", "has no tokenizer"),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=f"it: .*{words}"):
        read_tokenizer(tmp_path, "it")
