"""Models of a mixture from the Hub: of experts only the files with their MLPs are downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.hub_fixture import Hub
from support.tiny import identical, load


@pytest.mark.exhaustive
def test_models_of_the_hub(hub: Hub, dense: Path, tmp_path: Path) -> None:
    for name in ("base", "a"):
        hub.put(f"org/{name}", dense / "llama" / name)
    weights = load(dense / "llama" / "b")
    shards = {
        "model-00001-of-00002.safetensors": {k: v for k, v in weights.items() if ".mlp." in k},
        "model-00002-of-00002.safetensors": {k: v for k, v in weights.items() if ".mlp." not in k},
    }
    from safetensors.torch import save

    index = {"weight_map": {key: file for file, tensors in shards.items() for key in tensors}}
    files = {file: save(tensors, {"format": "pt"}) for file, tensors in shards.items()}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files["config.json"] = (dense / "llama" / "b" / "config.json").read_bytes()
    hub.put("org/b", files)
    prompts = (["one two"], ["the cat"])
    experts = [{"source_model": f"org/{n}", "positive_prompts": p} for n, p in zip("ab", prompts, strict=True)]
    (tmp_path / "hub.yml").write_text(yaml.safe_dump({"base_model": "org/base", "experts": experts}))
    local = [{**each, "source_model": str(dense / "llama" / n)} for n, each in zip("ab", experts, strict=True)]
    (tmp_path / "local.yml").write_text(yaml.safe_dump({"base_model": str(dense / "llama" / "base"), "experts": local}))
    for name in ("hub", "local"):
        command = [sys.executable, "-m", "merging", "moe", str(tmp_path / f"{name}.yml"), "-o", str(tmp_path / name)]
        done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert identical(load(tmp_path / "hub"), load(tmp_path / "local"))
    asked = [request.path for request in hub.log() if request.method == "GET" and not request.range]
    assert any("model-00001-of-00002" in path for path in asked)
    assert not any("model-00002-of-00002" in path for path in asked)
    assert "org/b@" in (tmp_path / "hub" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert AutoTokenizer.from_pretrained(tmp_path / "hub")("one two")
