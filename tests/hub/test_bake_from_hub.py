"""Adapters on the Hub baked into a base on the Hub: its twin in 16 bits, its revision, its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import merging
from support.adapters import LLAMA, QUIRKS, edit_config, save_base, train
from support.hub_fixture import Hub, serve
from support.tiny import identical, load
from support.tokenized import tokenizer_of

pytestmark = [pytest.mark.exhaustive, *QUIRKS]


def bake(hub: Hub, folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "merging", "bake", *words],
        env=hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return " ".join((done.stdout + done.stderr).split())


def quantised(folder: Path, base: Path) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return folder


@pytest.mark.parametrize("twin", ["by name", "by card"])
def test_the_twin_of_a_quantised_base_on_the_hub(tmp_path: Path, twin: str) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = train(tmp_path / "one", base, 1, LLAMA)
    tokenizer_of("bytes", "a", []).save_pretrained(adapter)
    merging.bake([adapter], base=base, output=tmp_path / "wanted")
    name, repo = {"by name": ("org/small-bnb-4bit", "org/small"), "by card": ("me/copy", "other/small")}[twin]
    edit_config(adapter, base_model_name_or_path=name)
    with serve(tmp_path / "root") as hub:
        hub.put(repo, base)
        hub.put(name, quantised(tmp_path / "mirror", base), card={"base_model": repo} if twin == "by card" else None)
        hub.put("me/lora", {path.name: path for path in adapter.iterdir() if path.name != "README.md"})
        printed = bake(hub, tmp_path, "me/lora", "-o", "out")
    assert f"states the quantised base {name}: its 16-bit twin {repo} is used instead" in printed
    assert identical(load(tmp_path / "out"), load(tmp_path / "wanted"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()


def test_the_revision_that_an_adapter_states(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = train(tmp_path / "one", base, 1, LLAMA)
    edit_config(adapter, base_model_name_or_path="org/small", revision="first")
    with serve(tmp_path / "root") as hub:
        hub.put("org/small", base)
        hub.tag("org/small", "first")
        hub.put("org/small", {"model.safetensors": b"damaged"})
        printed = bake(hub, tmp_path, "one", "-o", "out")
    assert "the base is org/small@first, as one states" in printed
    merging.bake([adapter], base=base, output=tmp_path / "wanted")
    assert identical(load(tmp_path / "out"), load(tmp_path / "wanted"))
