"""Families and trainers are named by what a file states or shows, and by nothing that a stranger may only write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.api.inspect import inspect
from merging.sources.trainers import trainer_of

PAIR = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
LLAMA, FLUX = "base_model.model.model.layers.0.self_attn.q_proj", "diffusion_model.double_blocks.0.img_attn.qkv"


def named(stem: str) -> dict[str, torch.Tensor]:
    return {f"{stem}.{leaf}": value for leaf, value in PAIR.items()}


def folder(path: Path, card: str = "", **config: Any) -> Path:
    save_file(named(LLAMA), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}))
    (path / "README.md").write_text(card)
    return path


HEADERS = [
    ({"ot_revision": "1", "ss_network_module": "networks.lora"}, "OneTrainer"),
    ({"software": '{"name": "ai-toolkit"}', "ss_network_module": "networks.lora"}, "ai-toolkit"),
    ({"software": "{ai-toolkit, and no JSON"}, "ai-toolkit"),
    ({"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"}, "sd-scripts"),
    ({"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux_kontext"}, "musubi-tuner"),
    ({"ss_network_module": "networks.lora", "ss_base_model_version": "hunyuan_video"}, "musubi-tuner"),
    ({"ss_network_module": f"networks.{'_' * 50_000}wan!"}, "sd-scripts"),
    ({"ss_network_module": "lycoris.kohya"}, "sd-scripts with LyCORIS"),
    ({"ss_network_module": "of.my.own"}, None),
    ({"ss_output_name": "a", "modelspec.architecture": "flux"}, None),
]


@pytest.mark.parametrize(("header", "trainer"), HEADERS, ids=range(len(HEADERS)))
def test_headers(header: dict[str, str], trainer: str | None) -> None:
    found = trainer_of([f"{FLUX}.lora_A.weight"], header)
    assert (found.name if found else None) == trainer


CARDS = [
    ("---\ntags: [trl, unsloth]\n---", "Unsloth"),
    ("---\ntags: [Axolotl, 3, null]\n---", "Axolotl"),
    ("---\ntags: unsloth\n---", "PEFT"),
    ("---\n: bad [\n---", "PEFT"),
    ("---\ntags: [&a [*a]]\n---", "PEFT"),
    ("no head", "PEFT"),
]


@pytest.mark.parametrize(("card", "trainer"), CARDS, ids=range(len(CARDS)))
def test_cards(tmp_path: Path, card: str, trainer: str) -> None:
    assert inspect(folder(tmp_path, card))["trainer"] == trainer


HOSTILE: list[dict[str, Any]] = [
    {"peft_version": "\x1b[31m9", "auto_mapping": {"base_model_class": "A\x1b[2JForCausalLM"}},
    {"peft_version": 3, "auto_mapping": [1]},
    {"peft_version": "9" * 300, "auto_mapping": {"base_model_class": f"{'A' * 300}ForCausalLM"}},
]


@pytest.mark.parametrize("config", HOSTILE, ids=range(len(HOSTILE)))
def test_values_that_are_no_versions_or_classes_are_not_shown(tmp_path: Path, config: dict[str, Any]) -> None:
    facts = inspect(folder(tmp_path, **config))
    assert (facts["family"], facts["trainer"]) == ("unknown", "PEFT")
    assert facts["family_evidence"] is None


def test_language_models_are_no_components(tmp_path: Path) -> None:
    save_file(named("transformer.h.0.attn.c_attn"), tmp_path / "a.safetensors")
    facts = inspect(tmp_path / "a.safetensors")
    assert (facts["family"], facts["trainer"]) == ("GPT-2", "unknown")


def test_merged_adapters_are_merged_by_this_program(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    merging.merge([folder(tmp_path / "a"), folder(tmp_path / "b")], method="linear", output=tmp_path / "out")
    assert inspect(tmp_path / "out")["trainer"] == "merging"


def test_full_models_have_a_family(tmp_path: Path) -> None:
    save_file(
        {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(24, 8)}, tmp_path / "a.safetensors"
    )
    facts = inspect(tmp_path / "a.safetensors")
    assert (facts["kind"], facts["family"]) == ("checkpoint", "Flux.1")
    assert "trainer" not in facts
