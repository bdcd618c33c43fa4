"""Every recipe of the corpus makes a model that transformers loads, and that generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from support.commands import merge
from support.recipe_corpus import RECIPES
from support.recipe_zoo import save_zoo

REFUSED = {"card-slerp-other-base", "card-weight-misplaced", "docs-modules"}
"""Recipes that are refused here, all but the last by mergekit too."""

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_zoo(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - REFUSED))
def test_the_output_loads_and_generates(zoo: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    (zoo / f"{name}.yml").write_bytes(RECIPES[name].read_bytes())
    out = zoo / "out" / name
    done = merge("run", f"{name}.yml", "-o", out, "--lenient")
    assert not done.exit_code, done.output
    config = json.loads((out / "config.json").read_text())
    architecture = getattr(transformers, config["architectures"][0])
    model, loading = architecture.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    if not model.can_generate():
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings
    words = tokenizer("The ships", return_tensors="pt")
    with torch.no_grad():
        made = model.generate(words["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape[1] >= 4
    assert (
        model(**words, **({"decoder_input_ids": made} if config["model_type"] == "t5" else {})).logits.isfinite().all()
    )
