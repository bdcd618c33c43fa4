"""Factors of experts written with a name for each expert: the same change as stacked ones, to the bit, and in PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import merging
from merging.errors import InputError, OptionError
from merging.plan.recipe_files import load_recipe
from merging.plan.recipe_values import make_recipe
from support.adapters import QUIRKS, assert_close, base_state, quiet, reload, train
from support.architectures import ARCHITECTURES

UNMATCHED = "The following (rank|alpha)_pattern keys did not match any targeted module"
pytestmark = [*QUIRKS, pytest.mark.filterwarnings(f"ignore:{UNMATCHED}:RuntimeWarning")]

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PROJECTIONS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3-moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""Where the experts of a model lie on the disk, and what their projections are called: gate, up and down."""


@pytest.fixture(scope="module", params=PROJECTIONS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model's name, and a folder with it and two adapters of its experts. None is changed by a test."""
    root = tmp_path_factory.mktemp(request.param)
    with quiet():
        warnings.filterwarnings("ignore", message=UNMATCHED)
        torch.manual_seed(3)
        ARCHITECTURES[request.param]().save_pretrained(root / "base")
        train(root / "one", root / "base", 1, ["q_proj"], target_parameters=BOTH)
        train(root / "two", root / "base", 2, ["q_proj"], r=3, target_parameters=BOTH)
    return request.param, root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    "options",
    [{"method": "linear"}, {"method": "ties"}, {"method": "linear", "rank": 3}],
    ids=["sum of ranks", "not low rank", "cut"],
)
def test_experts_apart_are_the_stacked_ones_to_the_bit(
    case: tuple[str, Path], tmp_path: Path, options: dict[str, str | int]
) -> None:
    """A row of names for each expert; gate and up have a copy of their lower factor, and each its rows of the upper."""
    name, root = case
    module, (gate, up, down) = PROJECTIONS[name]
    for experts in ("together", "apart"):
        merging.merge(
            [root / "one", root / "two"], base=root / "base", experts=experts, output=tmp_path / experts, **options
        )
    stacked, apart = tensors(tmp_path / "together"), tensors(tmp_path / "apart")
    assert not any(".mlp.experts.lora" in key or "base_layer" in key for key in apart)
    count, rank = 4, json.loads((tmp_path / "apart" / "adapter_config.json").read_text())["r"]
    for layer in range(2):
        start = f"base_model.model.model.layers.{layer}"
        for leaf, names in ((".base_layer", (gate, up)), ("", (down,))):
            lower = stacked.pop(f"{start}.mlp.experts{leaf}.lora_A.weight").reshape(count, rank, -1)
            upper = stacked.pop(f"{start}.mlp.experts{leaf}.lora_B.weight").reshape(-1, rank, count)
            for expert in range(count):
                paths = [f"{start}.{module}.experts.{expert}.{each}" for each in names]
                assert all(torch.equal(apart.pop(f"{path}.lora_A.weight"), lower[expert]) for path in paths)
                rows = torch.cat([apart.pop(f"{path}.lora_B.weight") for path in paths])
                assert torch.equal(rows, upper[:, :, expert])
    assert apart.keys() == stacked.keys()
    assert all(torch.equal(apart[key], stacked[key]) for key in stacked)


def test_peft_runs_both_forms_equally(case: tuple[str, Path], tmp_path: Path) -> None:
    """PEFT stacks the experts when it loads them; our own reader gives the same model of both too."""
    name, root = case
    logits, models = [], []
    for experts in ("together", "apart"):
        out = tmp_path / experts
        merging.merge(
            [root / "one", root / "two"], method="task_arithmetic", base=root / "base", experts=experts, output=out
        )
        model = PeftModel.from_pretrained(reload(root / "base"), out).eval()
        with torch.no_grad():
            logits.append(model(torch.arange(12).view(2, 6)).logits)
        merging.merge(
            [out], method="task_arithmetic", base=root / "base", kind="model", output=tmp_path / f"baked {experts}"
        )
        models.append(base_state(tmp_path / f"baked {experts}"))
    with torch.no_grad():
        plain = reload(root / "base").eval()(torch.arange(12).view(2, 6)).logits
    assert (logits[0] - plain).abs().max() > 1e-3
    assert torch.allclose(logits[0], logits[1], atol=1e-5 * float(logits[0].abs().max()))
    assert_close(*models)
    config = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    assert "target_parameters" not in config
    assert config["target_modules"] == sorted(["q_proj", *PROJECTIONS[name][1]])


def test_the_option_is_kept_in_recipes() -> None:
    recipe = make_recipe({"models": ["a"], "method": "linear", "experts": "apart"})
    assert "experts: apart" in recipe.to_yaml()
    assert load_recipe(recipe.to_yaml()) == recipe


def test_experts_that_cannot_be_named_are_refused(case: tuple[str, Path], tmp_path: Path) -> None:
    _, root = case
    with pytest.raises(InputError, match=r"have names for single experts: give it with base="):
        merging.merge([root / "one"], method="linear", experts="apart", output=tmp_path / "out")
    with pytest.raises(OptionError, match="this merge makes a full model: leave it out"):
        merging.merge([root / "one"], method="linear", experts="apart", base=root / "base", kind="model")
    with quiet():
        plain = train(tmp_path / "plain", root / "base", 4, ["q_proj"])
    with pytest.raises(OptionError, match="the adapters change none: leave it out"):
        merging.merge([plain], method="linear", experts="apart", base=root / "base", output=tmp_path / "out")


def test_experts_of_a_base_that_keeps_them_together(tmp_path: Path) -> None:
    """Those of gpt-oss have no names of their own anywhere."""
    with quiet():
        torch.manual_seed(3)
        ARCHITECTURES["gpt-oss"]().save_pretrained(tmp_path / "base")
        one = train(tmp_path / "one", tmp_path / "base", 1, ["q_proj"], target_parameters=BOTH)
    with pytest.raises(InputError, match=r'keeps its experts together .* leave experts="apart" out'):
        merging.merge([one], method="linear", experts="apart", base=tmp_path / "base", output=tmp_path / "out")
