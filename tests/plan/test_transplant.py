"""A donor's tokenizer transplanted onto a model: shared rows stay, and the others are approximated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merging
from merging.errors import InputError, OutputError
from support.commands import ok
from support.tokenized import EMBEDDING, HEAD, rows_of, save_tokenized, tokens_of_file


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A narrow target, and a wider donor with a padded table."""
    root = tmp_path_factory.mktemp("transplant")
    save_tokenized(root / "target", "a", hidden_size=24)
    save_tokenized(root / "donor", "b", hidden_size=40, padding=5)
    return {name: root / name for name in ("target", "donor")}


def transplant(pair: dict[str, Path], out: Path, method: str = "omp", k: int = 8, **options: Any) -> Any:
    settings = {"source": str(pair["donor"]), "approximate": method, "k": k}
    return merging.merge([pair["target"]], method="passthrough", tokenizer=settings, output=out, **options)


@pytest.mark.parametrize("method", ["omp", "common_interpolation", "subword", "mean", "zero"])
def test_shared_tokens_keep_the_rows_of_the_target(pair: dict[str, Path], tmp_path: Path, method: str) -> None:
    merged = transplant(pair, tmp_path / "out", method)
    assert tokens_of_file(tmp_path / "out") == tokens_of_file(pair["donor"])
    for table in (EMBEDDING, HEAD):
        got, own = rows_of(tmp_path / "out", table), rows_of(pair["target"], table)
        shared = got.keys() & own.keys()
        assert all(torch.equal(got[token], own[token]) for token in shared)
    assert merged.facts["tokens shared"] == len(shared)
    assert merged.facts["tokens approximated"] == len(got) - len(shared)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert len(tensors[EMBEDDING]) == len(tokens_of_file(pair["donor"])) + 5
    target = load_file(pair["target"] / "model.safetensors")
    assert all(torch.equal(tensors[name], target[name]) for name in target if "layers" in name)


def test_rows_are_approximated_as_their_methods_say(pair: dict[str, Path], tmp_path: Path) -> None:
    own, donor = rows_of(pair["target"]), rows_of(pair["donor"])
    lacking = [token for token in donor if token not in own]
    for method in ("mean", "zero", "subword"):
        transplant(pair, tmp_path / method, method)
    mean = torch.stack(list(own.values())).mean(0)
    got = {method: rows_of(tmp_path / method) for method in ("mean", "zero", "subword")}
    tokenizer, theirs = (AutoTokenizer.from_pretrained(pair[name]) for name in ("target", "donor"))
    for token in lacking:
        torch.testing.assert_close(got["mean"][token], mean, rtol=0, atol=1e-7)
        assert not got["zero"][token].any()
        text = theirs.decode([theirs.get_vocab()[token]])
        pieces = torch.stack([own[piece] for piece in tokenizer.tokenize(text)]).mean(0)
        torch.testing.assert_close(got["subword"][token], pieces, rtol=0, atol=1e-7)


def test_a_pursuit_of_all_dimensions_finds_a_linear_map(pair: dict[str, Path], tmp_path: Path) -> None:
    """Where the target's shared rows are a linear image of the donor's, the approximated rows are it too."""
    target = tmp_path / "target"
    save_tokenized(target, "a", hidden_size=24)
    tensors = load_file(target / "model.safetensors")
    donor = load_file(pair["donor"] / "model.safetensors")
    rows, theirs = tokens_of_file(target), tokens_of_file(pair["donor"])
    image = torch.randn(40, 24, generator=torch.Generator().manual_seed(3))
    for token in rows.keys() & theirs.keys():
        tensors[EMBEDDING][rows[token]] = donor[EMBEDDING][theirs[token]] @ image
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    merged = transplant({"target": target, "donor": pair["donor"]}, tmp_path / "out", k=64)
    got, given = rows_of(tmp_path / "out"), rows_of(pair["donor"])
    for token in theirs.keys() - rows.keys():
        torch.testing.assert_close(got[token], given[token] @ image, rtol=1e-3, atol=1e-4)
    assert merged.facts[f"relative error in the donor's {EMBEDDING} (largest)"] < 1e-5


def test_more_shared_tokens_approximate_better(pair: dict[str, Path], tmp_path: Path) -> None:
    name = f"relative error in the donor's {EMBEDDING} (median)"
    errors = [transplant(pair, tmp_path / str(k), k=k).facts[name] for k in (1, 4, 16)]
    assert errors == sorted(errors, reverse=True)
    assert not math.isnan(errors[0])


def test_the_output_generates_and_is_made_again(pair: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    transplant(pair, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(" zebra quantum<|b|>", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    merging.rerun(out, output=tmp_path / "again")
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (out / file).read_bytes()


def test_the_bytes_do_not_depend_on_threads_or_memory(pair: dict[str, Path], tmp_path: Path) -> None:
    transplant(pair, tmp_path / "one", threads=1)
    transplant(pair, tmp_path / "three", threads=3, max_memory="1GB")
    one, three = (tmp_path / name / "model.safetensors" for name in ("one", "three"))
    assert one.read_bytes() == three.read_bytes()


def test_a_tied_target_stays_tied(pair: dict[str, Path], tmp_path: Path) -> None:
    save_tokenized(tmp_path / "tied", "a", hidden_size=24, tie_word_embeddings=True)
    transplant({"target": tmp_path / "tied", "donor": pair["donor"]}, tmp_path / "out")
    assert HEAD not in load_file(tmp_path / "out/model.safetensors")


def test_the_command(pair: dict[str, Path], tmp_path: Path) -> None:
    words = ("-o", tmp_path / "out", "-k", 8, "--dtype", "bfloat16")
    done = ok("tokens", pair["target"], pair["donor"], *words)
    assert "tokens shared: 264" in done.stderr and "relative error" in done.stderr
    assert load_file(tmp_path / "out/model.safetensors")[EMBEDDING].dtype == torch.bfloat16


def test_without_an_approximation_rows_are_zeros_and_noted(pair: dict[str, Path], tmp_path: Path) -> None:
    merged = merging.merge(
        [pair["target"]], method="passthrough", tokenizer=str(pair["donor"]), output=tmp_path / "out"
    )
    assert any("have rows of zeros: `merge tokens` approximates" in notice for notice in merged.notices)


def test_a_donor_is_an_input_that_no_output_replaces(pair: dict[str, Path]) -> None:
    stage = merging.Recipe(models=[str(pair["target"])], method="passthrough", tokenizer=str(pair["donor"]))
    with pytest.raises(OutputError, match="the output would replace the input"):
        transplant(pair, pair["donor"], overwrite=True)
    with pytest.raises(OutputError, match="the output would replace the input"):
        merging.merge([stage], method="passthrough", output=pair["donor"], overwrite=True)


def test_a_donor_without_a_shared_token_is_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    other = save_tokenized(tmp_path / "other", "b")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = []
    content["model"] = {"type": "WordLevel", "vocab": {"?0": 0, "?1": 1}, "unk_token": "?0"}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="share no token"):
        transplant({"target": pair["target"], "donor": other}, tmp_path / "out")
