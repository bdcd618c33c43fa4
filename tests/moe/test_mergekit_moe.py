"""Agreement with mergekit's mixtures: MERGEKIT_PYTHON names the Python of its environment (tests/peer)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import merging
from support.moe_recipes import two_experts
from support.paths import TESTS
from support.tiny import load

PEER = os.environ.get("MERGEKIT_PYTHON")

pytestmark = pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python that has mergekit")


def test_mergekit_makes_the_same_mixtures(dense: Path, tmp_path: Path) -> None:
    """In float32; with hidden_avg where prompts are equally long, as the peer averages over its padding too."""
    cases = {
        f"{kind}-{mode}-{negative}": two_experts(dense / kind, mode, negative=negative, even=mode == "hidden_avg")
        for kind in ("llama", "mistral", "qwen3")
        for mode, negative in (("hidden", True), ("hidden_last", False), ("hidden_avg", False), ("cheap_embed", True))
    }
    shared = {"source_model": str(dense / "qwen2" / "a"), "positive_prompts": ["def x"], "residual_scale": 0.5}
    cases["qwen2"] = {**two_experts(dense / "qwen2", "hidden"), "shared_experts": [shared]}
    cases["deepseek"] = {**two_experts(dense / "llama", "hidden"), "architecture": "deepseek"}
    arguments = []
    for name, values in cases.items():
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(values))
        merging.make_moe(tmp_path / f"{name}.yml", tmp_path / f"ours-{name}")
        arguments += [str(tmp_path / f"{name}.yml"), str(tmp_path / f"peer-{name}")]
    runner = TESTS / "peer" / "mergekit_moe_runner.py"
    assert PEER is not None
    subprocess.run([PEER, str(runner), *arguments], check=True, capture_output=True)
    for name in cases:
        ours, theirs = apart(load(tmp_path / f"ours-{name}")), apart(load(tmp_path / f"peer-{name}"))
        assert ours.keys() == theirs.keys(), name
        for key, value in theirs.items():
            if "gate.weight" in key:
                torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
            else:
                assert torch.equal(ours[key], value), f"{name}: {key}"


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with one name for every matrix of an expert, whether stacked or not."""
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    found = {}
    for name, value in tensors.items():
        short = name.replace("block_sparse_moe", "mlp")
        if short.endswith("experts.gate_up_proj"):
            for index, both in enumerate(value):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    found[f"{short.removesuffix('gate_up_proj')}{index}.{part}.weight"] = half
        elif short.endswith("experts.down_proj"):
            found |= {f"{short.removesuffix('down_proj')}{i}.down_proj.weight": each for i, each in enumerate(value)}
        else:
            *rest, part, last = short.split(".")
            found[".".join([*rest, names.get(part, part), last])] = value
    return found
