"""Intruder dimensions of adapters, reduced as PEFT reduces them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import merging
from merging.cli.main import cli
from merging.errors import InputError, OptionError
from support.adapters import QUIRKS, quiet

pytestmark = [*QUIRKS, pytest.mark.filterwarnings("ignore::merging.errors.ResultWarning")]

MODULES = ["q_proj", "v_proj", "down_proj", "up_proj"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a LoRA of rank 4 on square, wide and tall layers, of a size that makes intruders in most of them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with quiet():
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / "base")
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=MODULES))
        random = torch.Generator().manual_seed(1)
        for name, value in lora.named_parameters():
            if "lora_" in name:
                value.data = torch.randn(value.shape, generator=random) * (0.3 if "lora_A" in name else 0.02)
        lora.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora"


def peft_changes(base: Path, lora: Path, name: str, **settings: Any) -> dict[str, Tensor]:
    """The change of each layer after PEFT's own reduction."""
    with quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
        if settings:
            reduce_intruder_dimension(model, new_adapter_name=name, logging_sink=None, **settings)
    return {
        key.removeprefix("base_model.model."): layer.get_delta_weight(name).detach().double()
        for key, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"factor": 0.75, "threshold": 0.5, "leading": 10},
        {"factor": 0.0, "threshold": 0.3, "leading": 4},
        {"factor": 0.5, "threshold": 0.8, "leading": 200},
    ],
)
def test_as_peft_reduces_them(models: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    base, lora = models
    before = peft_changes(base, lora, "default")
    named = {"mitigation_lambda": "factor", "threshold_epsilon": "threshold", "top_k": "leading"}
    wanted = peft_changes(base, lora, "reduced", **{theirs: settings[ours] for theirs, ours in named.items()})
    given: Any = True if settings["factor"] == 0.75 else settings
    merged = merging.resize(lora, reduce_intruders=given, size=10**6, dtype="float32", output=tmp_path / "sized")
    assert merged.rank == 4
    merged = merging.resize(lora, reduce_intruders=given, dtype="float32", output=tmp_path / "out")
    assert set(merged.ranks.values()) <= set(range(5)) and merged.rank == 4
    assert any("base" in notice for notice in merged.notices)
    got = peft_changes(base, tmp_path / "out", "default")
    assert got.keys() == wanted.keys()
    for name, change in wanted.items():
        assert torch.allclose(got[name], change, atol=1e-5 * float(before[name].abs().max())), name
    assert any(not torch.allclose(change, wanted[name], atol=1e-2) for name, change in before.items())


def test_baked_without_a_cut(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full model has the changed weight with its intruders multiplied, of any rank."""
    base, lora = models
    monkeypatch.chdir(tmp_path)
    words = ["bake", str(lora), "--reduce-intruders", "--intruder-factor", "0.25", "-o", "baked", "--json"]
    run = CliRunner().invoke(cli, words)
    assert run.exit_code == 0, run.output
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "baked"))
    changed = 0
    for name, change in peft_changes(base, lora, "default").items():
        weight = before[f"{name}.weight"].double()
        u0 = torch.linalg.svd(weight, full_matrices=False)[0]
        u, s, vh = torch.linalg.svd(weight + change, full_matrices=False)
        new = [each for each in range(10) if float((u0.mT @ u[:, each]).abs().max()) < 0.5]
        changed += bool(new)
        wanted = weight + change - 0.75 * (u[:, new] * s[new]) @ vh[new]
        assert torch.allclose(after[f"{name}.weight"].double(), wanted, atol=1e-6), name
    assert changed


def test_command_and_recipe(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora = models
    monkeypatch.chdir(tmp_path)
    words = ["resize", str(lora), "--reduce-intruders", "--intruder-factor", "0.5", "--recipe-only"]
    run = CliRunner().invoke(cli, words)
    recipe = merging.load_recipe(run.stdout)
    assert recipe.base == str(base)
    assert recipe.to_dict()["reduce_intruders"] == {"factor": 0.5, "threshold": 0.5, "leading": 10}
    recipe.run(tmp_path / "one.safetensors")
    merging.resize(lora, reduce_intruders={"factor": 0.5}, output=tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    merging.rerun(tmp_path / "one.safetensors", output=tmp_path / "three.safetensors")
    one, three = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "three"))
    assert all(torch.equal(value, three[name]) for name, value in one.items())


def test_refusals(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = models
    out: dict[str, Any] = {"output": tmp_path / "out"}
    with pytest.raises(OptionError, match="reduce_intruders=True compares with the base: give it with base="):
        merging.merge([lora], method="linear", reduce_intruders=True, **out)
    with pytest.raises(OptionError, match="is for adapters of linear layers and convolutions, and there are none"):
        merging.merge([base], method="linear", base=base, reduce_intruders=True, **out)
    with pytest.raises(InputError, match="is a full model, and only LoRAs are resized"):
        merging.resize(base, reduce_intruders=True, **out)
    with pytest.raises(OptionError, match=r"reduce_intruders\.factor = 2: should be at most 1"):
        merging.resize(lora, reduce_intruders={"factor": 2}, **out)
    run = CliRunner().invoke(cli, ["resize", str(lora), "--intruder-factor", "0.5", "-o", str(tmp_path / "out")])
    assert run.exit_code == 1 and "--intruder-factor is for --reduce-intruders" in run.output
    assert not (tmp_path / "out").exists()
