"""Rebuilt tokenizers of every kind: transformers reads them, and splits texts as both parents do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import merging
from support.tokenized import KINDS, save_tokenized, tokens_of_file


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_reads_and_writes_both_parents_tokens(kind: str, tmp_path: Path) -> None:
    for name in "ab":
        save_tokenized(tmp_path / name, name, kind)
    out = tmp_path / "out"
    merging.merge([tmp_path / "a", tmp_path / "b"], method="linear", tokenizer="union", output=out)
    union = AutoTokenizer.from_pretrained(out)
    parents = [AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab"]
    rows = union.get_vocab()
    assert rows == tokens_of_file(out)
    assert rows.keys() == parents[0].get_vocab().keys() | parents[1].get_vocab().keys()
    assert parents[0].get_vocab().items() <= rows.items()
    text = "the cat<|a|>zebra<|b|>hello"
    ids = union(text, add_special_tokens=False)["input_ids"]
    assert rows["<|a|>"] in ids and rows["<|b|>"] in ids
    assert union.decode(ids).replace(" ", "") == text.replace(" ", "")
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == max(rows.values()) + 1
    assert (config["eos_token_id"], config["pad_token_id"]) == (union.eos_token_id, union.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(torch.tensor([ids]), max_new_tokens=2).shape[1] > len(ids)


def test_words_are_split_as_the_first_parent_splits_them_and_then_joined(tmp_path: Path) -> None:
    for name in "ab":
        save_tokenized(tmp_path / name, name)
    out = tmp_path / "out"
    merging.merge([tmp_path / "a", tmp_path / "b"], method="linear", tokenizer="union", output=out)
    a, b, union = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "a", tmp_path / "b", out))
    assert union.tokenize("the cat sat on the mat") == a.tokenize("the cat sat on the mat")
    assert union.tokenize(" zebra quantum") == b.tokenize(" zebra quantum") != a.tokenize(" zebra quantum")


def test_the_tokens_of_another_kind_have_rows_and_are_noted(tmp_path: Path) -> None:
    save_tokenized(tmp_path / "a", "a", "bytes")
    save_tokenized(tmp_path / "b", "b", "t5")
    out = tmp_path / "out"
    merged = merging.merge([tmp_path / "a", tmp_path / "b"], method="linear", tokenizer="union", output=out)
    assert any("have rows, but no text is split into them" in notice for notice in merged.notices)
    assert "▁qu" in AutoTokenizer.from_pretrained(out).get_vocab()


def test_ids_follow_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    for name, folder in (("a", "a"), ("b", "b")):
        save_tokenized(tmp_path / folder, name, special=[f"<|{name}|>", "<|image|>"])
    path = tmp_path / "a/config.json"
    image = tokens_of_file(tmp_path / "a")["<|image|>"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_id": image, "audio_token_id": 300000}))
    out = tmp_path / "out"
    merging.merge([tmp_path / "a", tmp_path / "b"], method="linear", tokenizer=str(tmp_path / "b"), output=out)
    rows, config = tokens_of_file(out), json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    assert rows == tokens_of_file(tmp_path / "b") != tokens_of_file(tmp_path / "a")
    assert config["bos_token_id"] == generation["bos_token_id"] == rows["<s>"]
    assert config["eos_token_id"] == generation["eos_token_id"] == rows["</s>"]
    assert config["image_token_id"] == rows["<|image|>"] != image
    assert "audio_token_id" not in config


def test_added_tokens_keep_their_flags(tmp_path: Path) -> None:
    for name in "ab":
        save_tokenized(tmp_path / name, name)
    path = tmp_path / "b/tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1] |= {"lstrip": True, "special": False}
    path.write_text(json.dumps(content))
    out = tmp_path / "out"
    merging.merge([tmp_path / "a", tmp_path / "b"], method="linear", tokenizer="union", output=out)
    added = {each["content"]: each for each in json.loads((out / "tokenizer.json").read_text())["added_tokens"]}
    assert (added["<|b|>"]["lstrip"], added["<|b|>"]["special"]) == (True, False)
    assert added["<|a|>"]["special"]


def test_files_of_the_former_vocabulary_are_not_copied(tmp_path: Path) -> None:
    for name in "ab":
        save_tokenized(tmp_path / name, name)
    for file in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
        (tmp_path / "a" / file).write_text("{}")
    merging.merge([tmp_path / "a", tmp_path / "b"], method="linear", tokenizer="union", output=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not {"vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"} & names
