"""Vocabularies merged by token, compared with mergekit: the rows of each token agree, whatever their order."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import merging
from support.paths import TESTS
from support.tokenized import EMBEDDING, HEAD, rows_of, save_tokenized, tokens_of_file

PEER = os.environ.get("MERGEKIT_PYTHON")

pytestmark = pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python that has mergekit")

MERGES: dict[str, tuple[str, str | None, Any]] = {
    "union": ("abc", None, "union"),
    "union-base": ("ab", "c", "union"),
    "base": ("bc", "a", "base"),
    "model": ("bc", "a", "b"),
    "padded": ("abc", None, {"source": "union", "pad_to_multiple_of": 64}),
    "sources": (
        "bc",
        "a",
        {
            "source": "b",
            "pad_to_multiple_of": 32,
            "tokens": {
                "<|shared|>": {"source": "c", "force": True},
                "ze": {"source": {"kind": "model_token", "model": "a", "token": "the"}},
                "<|a|>": {"source": {"kind": "zero"}},
                "merge": {"source": {"kind": "zero"}},
                "zebra": {"source": {"kind": "zero"}, "force": True},
            },
        },
    ),
}
"""The models, the base and the tokenizer of merges, by name; models are named by letters."""

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def at(folder: Path, settings: Any) -> Any:
    """Settings with the paths of models."""
    if isinstance(settings, dict):
        return {key: at(folder, value) for key, value in settings.items()}
    return str(folder / settings) if settings in ("a", "b", "c") else settings


def configuration(folder: Path, models: str, base: str | None, tokenizer: Any) -> dict[str, Any]:
    listed = [{"model": str(folder / name), "parameters": {"weight": WEIGHTS[name]}} for name in models]
    method = {"merge_method": "linear"} if base is None else {"merge_method": "task_arithmetic"}
    settings = {"tokenizer": at(folder, tokenizer if isinstance(tokenizer, dict) else {"source": tokenizer})}
    return {"models": listed, **method, "dtype": "float32", **settings} | (
        {} if base is None else {"base_model": str(folder / base)}
    )


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and the peer's outputs of all merges."""
    root = tmp_path_factory.mktemp("peer-tokens")
    for name in "abc":
        save_tokenized(root / name, name, special=[f"<|{name}|>", *(["<|shared|>"] if name != "a" else [])])
    arguments = []
    for name, merge in MERGES.items():
        (root / f"{name}.yml").write_text(yaml.safe_dump(configuration(root, *merge), allow_unicode=True))
        arguments += [str(root / f"{name}.yml"), str(root / f"peer-{name}")]
    command = [str(PEER), str(TESTS / "peer" / "mergekit_runner.py"), *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert [each["error"] for each in json.loads(done.stdout)] == [None] * len(MERGES)
    return root


@pytest.mark.parametrize("name", MERGES)
def test_rows_agree_by_token(peers: Path, tmp_path: Path, name: str) -> None:
    models, base, tokenizer = MERGES[name]
    options: dict[str, Any] = {"method": "linear"} if base is None else {"method": "task_arithmetic"}
    options |= {} if base is None else {"base": str(peers / base)}
    ours, theirs = tmp_path / "ours", peers / f"peer-{name}"
    merging.merge(
        [peers / each for each in models],
        weights=[WEIGHTS[each] for each in models],
        tokenizer=at(peers, tokenizer),
        output=ours,
        **options,
    )
    for table in (EMBEDDING, HEAD):
        got, wanted = rows_of(ours, table), rows_of(theirs, table)
        assert got.keys() == wanted.keys()
        for token, row in wanted.items():
            torch.testing.assert_close(
                got[token], row, rtol=0, atol=2e-7, msg=lambda text, token=token: f"{token}: {text}"
            )
        sizes = [len(load_file(folder / "model.safetensors")[table]) for folder in (ours, theirs)]
        assert sizes[0] == sizes[1]


def test_where_the_peer_is_wrong(peers: Path, tmp_path: Path) -> None:
    """Its config keeps the base's ids under another tokenizer, and further tokens cut words that contain them."""
    merging.merge(
        [peers / "b", peers / "c"],
        method="task_arithmetic",
        base=peers / "a",
        tokenizer=str(peers / "b"),
        output=tmp_path / "ours",
    )
    rows, config = tokens_of_file(tmp_path / "ours"), json.loads((tmp_path / "ours/config.json").read_text())
    assert config["bos_token_id"] == rows["<s>"]
    wrong = json.loads((peers / "peer-model/config.json").read_text())
    assert wrong["bos_token_id"] != tokens_of_file(peers / "peer-model")["<s>"]
    added = json.loads((peers / "peer-union-base/tokenizer.json").read_text())["added_tokens"]
    assert "de" in {each["content"] for each in added}  # found in "model" before the text is split


OTHERS = ("common_interpolation", "subword", "mean", "zero")


@pytest.mark.parametrize("method", ["omp", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in OTHERS)])
def test_transplanted_rows_agree(tmp_path: Path, method: str) -> None:
    """With mergekit-tokensurgeon, which is next to the peer's Python."""
    target = save_tokenized(tmp_path / "target", "a", hidden_size=32)
    donor = save_tokenized(tmp_path / "donor", "b", hidden_size=48)
    program = Path(str(PEER)).parent / "mergekit-tokensurgeon"
    words = [str(target), str(donor), str(tmp_path / "theirs"), "-a", method, "-k", "8", "--no-write-model-card"]
    subprocess.run([str(program), *words], capture_output=True, check=True)
    settings = {"source": str(donor), "approximate": method, "k": 8}
    merging.merge([target], method="passthrough", tokenizer=settings, output=tmp_path / "ours")
    for table in (EMBEDDING, HEAD):
        got, wanted = rows_of(tmp_path / "ours", table), rows_of(tmp_path / "theirs", table)
        assert got.keys() == wanted.keys()
        for token, row in wanted.items():
            torch.testing.assert_close(got[token], row, rtol=1e-5, atol=1e-6)
