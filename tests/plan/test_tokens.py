"""Vocabularies merged by token: the rows of each token, whatever its place in each model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import merging
from merging.errors import InputError, OptionError
from support.tokenized import EMBEDDING, HEAD, rows_of, save_tokenized, tokens_of_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three models with the special tokens <|a|>, <|b|>, <|c|>, and <|shared|> of the last two."""
    root = tmp_path_factory.mktemp("tokens")
    for name in "abc":
        special = [f"<|{name}|>", *(["<|shared|>"] if name != "a" else [])]
        save_tokenized(root / name, name, special=special, padding=7 if name == "a" else 0)
    return {name: str(root / name) for name in "abc"}


def merge(folders: dict[str, str], names: str, out: Path, **options: Any) -> Path:
    if "base" in options:
        options["base"] = folders[options["base"]]
    merging.merge([folders[name] for name in names], output=out, **options)
    return out


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)  # type: ignore[return-value]


def filled(given: list[dict[str, Tensor]], token: str) -> list[Tensor]:
    """The rows of a token in models; where one lacks it, the mean of the others."""
    found = [rows[token] for rows in given if token in rows]
    return [rows.get(token, mean(found)) for rows in given]


@pytest.mark.parametrize("table", [EMBEDDING, HEAD])
def test_a_missing_token_has_the_mean_of_the_models_that_have_it(
    folders: dict[str, str], tmp_path: Path, table: str
) -> None:
    out = merge(folders, "abc", tmp_path / "out", method="linear", weights=[0.5, 0.3, 0.2], tokenizer="union")
    got, given = rows_of(out, table), [rows_of(Path(folders[name]), table) for name in "abc"]
    assert got.keys() == given[0].keys() | given[1].keys() | given[2].keys()
    for token, row in got.items():
        rows = filled(given, token)
        torch.testing.assert_close(row, 0.5 * rows[0] + 0.3 * rows[1] + 0.2 * rows[2], rtol=0, atol=1e-7)


def test_a_missing_token_has_the_row_of_the_base(folders: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "task_arithmetic", "base": "c", "weights": [0.5, 0.25]}
    out = merge(folders, "ab", tmp_path / "out", tokenizer="base", **options)
    a, b, c = (rows_of(Path(folders[name])) for name in "abc")
    got = rows_of(out)
    assert got.keys() == c.keys()
    for token, row in got.items():
        base = c[token]
        wanted = base + 0.5 * (a.get(token, base) - base) + 0.25 * (b.get(token, base) - base)
        torch.testing.assert_close(row, wanted, rtol=0, atol=1e-7)


def test_rows_of_the_first_model_and_its_padding_stay(folders: dict[str, str], tmp_path: Path) -> None:
    out = merge(folders, "ab", tmp_path / "out", method="linear", tokenizer="union")
    first, got = tokens_of_file(Path(folders["a"])), tokens_of_file(out)
    assert {token: got[token] for token in first} == first
    assert sorted(got.values()) == list(range(len(got)))
    alone = merge(folders, "ab", tmp_path / "alone", method="linear", tokenizer=folders["a"])
    padded = load_file(Path(folders["a"]) / "model.safetensors")[EMBEDDING]
    kept = load_file(alone / "model.safetensors")[EMBEDDING]
    assert len(kept) == len(padded) == len(first) + 7
    torch.testing.assert_close(kept[len(first) :], padded[len(first) :])
    assert json.loads((alone / "config.json").read_text())["vocab_size"] == len(padded)


def test_sources_of_single_tokens(folders: dict[str, str], tmp_path: Path) -> None:
    tokens = {
        "Ġquantum": {"source": folders["b"] + "/"},
        "the": {"source": folders["b"], "force": True},
        "ze": {"source": {"kind": "model_token", "model": folders["a"], "token": "the"}},
        "merge": {"source": {"kind": "zero"}},
        "zebra": {"source": {"kind": "zero"}, "force": True},
        "<|new|>": {"source": {"kind": "model_token", "model": folders["a"], "token_id": 5}},
    }
    settings = {"source": folders["b"], "tokens": tokens, "pad_to_multiple_of": 64}
    out = merge(folders, "ab", tmp_path / "out", method="linear", tokenizer=settings)
    a, b, got = rows_of(Path(folders["a"])), rows_of(Path(folders["b"])), rows_of(out)
    assert got.keys() == b.keys() | {"<|new|>"}
    raw = load_file(Path(folders["a"]) / "model.safetensors")[EMBEDDING]
    torch.testing.assert_close(got["ze"], (a["the"] + b["ze"]) / 2)
    torch.testing.assert_close(got["merge"], (a["merge"] + b["merge"]) / 2)
    assert not got["zebra"].any()
    torch.testing.assert_close(got["<|new|>"], raw[5])
    values = load_file(out / "model.safetensors")[EMBEDDING]
    assert len(values) % 64 == 0
    torch.testing.assert_close(got["the"], b["the"])
    torch.testing.assert_close(got["Ġquantum"], b["Ġquantum"])


def test_models_of_one_tokenizer_stay_as_they_are(folders: dict[str, str], tmp_path: Path) -> None:
    twice = [folders["a"], folders["a"]]
    for name, options in (("plain", {}), ("tokens", {"tokenizer": "union"})):
        merging.merge(twice, output=tmp_path / name, method="linear", **options)  # type: ignore[arg-type]
    plain, tokens = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "tokens"))
    assert all(torch.equal(plain[name], tokens[name]) for name in plain)
    assert (tmp_path / "plain/tokenizer.json").read_bytes() == (tmp_path / "tokens/tokenizer.json").read_bytes()


def test_the_bytes_do_not_depend_on_threads(folders: dict[str, str], tmp_path: Path) -> None:
    for threads in (1, 3):
        merge(folders, "cab", tmp_path / str(threads), method="linear", tokenizer="union", threads=threads)
    one, three = (tmp_path / name / "model.safetensors" for name in "13")
    assert one.read_bytes() == three.read_bytes()


def test_a_tied_head_is_written_out_where_another_model_has_its_own(folders: dict[str, str], tmp_path: Path) -> None:
    save_tokenized(tmp_path / "tied", "b", tie_word_embeddings=True)
    out = tmp_path / "out"
    merging.merge([tmp_path / "tied", folders["a"]], method="linear", tokenizer="union", output=out)
    tied, other = rows_of(tmp_path / "tied"), rows_of(Path(folders["a"]), HEAD)
    head = rows_of(out, HEAD)
    torch.testing.assert_close(head["zebra"], tied["zebra"])
    torch.testing.assert_close(head["merge"], (tied["merge"] + other["merge"]) / 2)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, names: str = "ab", **options: Any) -> None:
        with pytest.raises(error, match=words):
            merge(folders, names, tmp_path / "none", method="linear", **options)
        assert not (tmp_path / "none").exists()

    refused(InputError, r"lost\.jinja: there is no such file, and chat_template= names it", chat_template="lost.jinja")

    tokens = {"the": {"source": folders["c"]}}
    refused(OptionError, "the source of 'the', .*c, is none of the models", tokenizer={"tokens": tokens})
    tokens = {"nonsense": {"source": folders["a"]}}
    refused(InputError, "a, does not have the token 'nonsense'", tokenizer={"tokens": tokens})
    refused(OptionError, "by their index: leave vocabulary= out", tokenizer="union", vocabulary="largest")
    bare = dict(folders, a=str(tmp_path / "bare"))
    (tmp_path / "bare").mkdir()
    save_file(load_file(Path(folders["a"]) / "model.safetensors"), tmp_path / "bare/model.safetensors")
    with pytest.raises(InputError, match="bare: has no tokenizer"):
        merge(bare, "ab", tmp_path / "none", method="linear", tokenizer="union")
    for file, kind in (("tekken.json", "Tekken"), ("tokenizer.model", "SentencePiece")):
        (tmp_path / "bare" / file).write_text("{}")
        with pytest.raises(InputError, match=f"of the kind {kind} alone"):
            merge(bare, "ab", tmp_path / "none", method="linear", tokenizer="union")
        (tmp_path / "bare" / file).unlink()
    (tmp_path / "bare/vocab.json").write_text(json.dumps({"the": 0}))
    with pytest.raises(InputError, match=r"without a tokenizer\.json cannot be extended"):
        merge(bare, "ab", tmp_path / "none", method="linear", tokenizer="union")


def test_the_parts_of_a_stack_are_matched_before_it_is_built(folders: dict[str, str], tmp_path: Path) -> None:
    """The first part's embedding and the last part's head have the rows of all tokens."""
    recipe = {"stack": [{"model": folders["c"]}, {"model": folders["b"], "layers": "0:1"}], "tokenizer": "union"}
    merging.load_recipe(yaml.safe_dump(recipe)).run(tmp_path / "out")
    b, c = (Path(folders[name]) for name in "bc")
    embedding, head = rows_of(tmp_path / "out"), rows_of(tmp_path / "out", HEAD)
    own, lent = rows_of(c), rows_of(b)
    assert embedding.keys() == head.keys() == own.keys() | lent.keys()
    assert all(torch.equal(row, own.get(token, lent.get(token))) for token, row in embedding.items())
    own, lent = rows_of(b, HEAD), rows_of(c, HEAD)
    assert all(torch.equal(row, own.get(token, lent.get(token))) for token, row in head.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 3
    assert model.config.vocab_size == len(embedding)


def test_slices_of_models_are_merged_by_token(folders: dict[str, str], tmp_path: Path) -> None:
    parts = [{"model": folders[name], "layers": "0:2"} for name in "ab"]
    recipe = {"models": parts, "method": "linear", "tokenizer": "union"}
    merging.load_recipe(yaml.safe_dump(recipe)).run(tmp_path / "slices")
    merge(folders, "ab", tmp_path / "whole", method="linear", tokenizer="union")
    slices, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("slices", "whole"))
    assert all(torch.equal(slices[name], whole[name]) for name in whole)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "slices" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_the_tokenizer_of_a_base_in_layers_is_the_bases(folders: dict[str, str], tmp_path: Path) -> None:
    parts = {name: {"model": folders[name], "layers": "0:2"} for name in "ab"}
    recipe = {"models": [parts["a"]], "base": parts["b"], "method": "task_arithmetic", "tokenizer": "union"}
    merging.load_recipe(yaml.safe_dump(recipe)).run(tmp_path / "slices")
    merge(folders, "a", tmp_path / "whole", base="b", method="task_arithmetic", tokenizer="union")
    slices, whole = ((tmp_path / name / "tokenizer.json").read_text() for name in ("slices", "whole"))
    assert slices == whole


def test_adapters_keep_their_base_by_token(folders: dict[str, str], tmp_path: Path) -> None:
    """A trained table of tokens is merged where the rows of all models stay, and refused where they move."""
    for name, targets in (("blocks", ["q_proj"]), ("tables", ["q_proj", "embed_tokens"])):
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["a"]), config)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    options: dict[str, Any] = {"method": "linear", "base": folders["a"], "kind": "model"}
    for name in ("blocks", "tables"):
        for out, more in (("plain", {}), ("tokens", {"tokenizer": "base"})):
            merging.merge([tmp_path / name], output=tmp_path / out, overwrite=True, **options, **more)
        plain, tokens = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "tokens"))
        assert all(torch.equal(plain[each], tokens[each]) for each in plain)
    both = [tmp_path / "blocks", folders["b"]]
    merging.merge(both, method="task_arithmetic", base=folders["a"], tokenizer="union", output=tmp_path / "both")
    with pytest.raises(InputError, match=r"tables: it trained .*embed_tokens"):
        merging.merge([tmp_path / "tables"], output=tmp_path / "none", tokenizer=folders["b"], **options)


def test_merged_slices_are_matched_before_they_are_merged(tmp_path: Path) -> None:
    """A stack of merges, of one block and of three, is the merge of the whole models."""
    for name in "ab":
        save_tokenized(tmp_path / name, name, num_hidden_layers=4)
    folders = {name: str(tmp_path / name) for name in "ab"}
    parts = [[{"model": folders[name], "layers": layers} for name in "ab"] for layers in ("0:1", "1:4")]
    stack = [{"model": {"models": part, "method": "linear"}} for part in parts]
    merging.load_recipe(yaml.safe_dump({"stack": stack, "tokenizer": "union"})).run(tmp_path / "stack")
    merge(folders, "ab", tmp_path / "whole", method="linear", tokenizer="union")
    stacked, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("stack", "whole"))
    assert stacked.keys() == whole.keys()
    assert all(torch.equal(stacked[name], whole[name]) for name in whole)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "stack" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize("own", ["union", None])
def test_a_recipe_among_the_models_is_merged_by_token(folders: dict[str, str], tmp_path: Path, own: str | None) -> None:
    """With a tokenizer of its own its output's tokens are matched, else the tokens of its models."""
    inner: dict[str, Any] = {"models": [folders["a"], folders["b"]], "method": "linear"}
    recipe = {"models": [inner | ({"tokenizer": own} if own else {}), folders["c"]], "method": "linear"}
    merging.load_recipe(yaml.safe_dump(recipe | {"tokenizer": "union"})).run(tmp_path / "out")
    got, given = rows_of(tmp_path / "out"), [rows_of(Path(folders[name])) for name in "abc"]
    assert got.keys() == given[0].keys() | given[1].keys() | given[2].keys()
    stage = {token: mean(filled(given[:2], token)) for token in given[0].keys() | given[1].keys()}
    for token, row in got.items():
        if own:
            wanted = mean(filled([stage, given[2]], token))
        else:
            a, b, c = filled(given, token)
            wanted = ((a + b) / 2 + c) / 2
        torch.testing.assert_close(row, wanted, rtol=0, atol=1e-7)
