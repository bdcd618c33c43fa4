"""LoRAs of other ranks: the best approximation of the product, in every format, with blocks scaled or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.cli.main import cli
from support.tiny import adapters

pytestmark = pytest.mark.filterwarnings("ignore::merging.errors.ResultWarning")

UNET = "down_blocks.1.attentions.0.transformer_blocks.0"
MODULES = ("attn1.to_q", "attn1.to_k", "attn2.to_v", "ff.net.2")


def diffusion_lora(path: Path, rank: int = 12) -> Path:
    """A LoRA of a U-Net in diffusers' names, whose singular values decrease in some modules faster than in others."""
    random, tensors = torch.Generator().manual_seed(1), {}
    for place, module in enumerate(MODULES):
        decay = torch.arange(1, rank + 1) ** -(0.5 + place)
        name = f"unet.{UNET}.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 32, generator=random) * decay[:, None]
        tensors[f"{name}.lora_B.weight"] = torch.randn(24, rank, generator=random)
    save_file(tensors, path)
    return path


def products(path: Path) -> dict[str, Tensor]:
    """The change of each module in a file with factors of any names, scaled by its alpha."""
    found = {}
    tensors = load_file(path)
    for name, down in tensors.items():
        for lower, upper in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if lower in name:
                alpha = tensors.get(f"{name.partition(f'.{lower}')[0]}.alpha")
                scale = 1.0 if alpha is None else float(alpha) / len(down)
                product = scale * tensors[name.replace(lower, upper)].double() @ down.double()
                found[name.partition(f".{lower}")[0]] = product
    return found


@pytest.mark.parametrize("conditions", [{"rank": 3}, {"energy": 0.8}, {"sv_ratio": 4}, {"error": 0.3}, {"size": 6000}])
def test_the_best_approximation_of_the_product(tmp_path: Path, conditions: dict[str, Any]) -> None:
    given = diffusion_lora(tmp_path / "a.safetensors")
    merged = merging.resize(given, output=tmp_path / "b.safetensors", dtype="float32", **conditions)
    wanted, got = products(given), products(tmp_path / "b.safetensors")
    assert got.keys() == wanted.keys()
    for name, product in wanted.items():
        rank = next(value for target, value in merged.ranks.items() if target.startswith(name))
        u, s, vh = torch.linalg.svd(product, full_matrices=False)
        assert torch.allclose(got[name], (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5)
        if "energy" in conditions:
            kept = s.square().cumsum(0) / s.square().sum()
            assert kept[rank - 1] >= 0.8 > ([0.0, *kept.tolist()])[rank - 1]
        if "sv_ratio" in conditions:
            assert rank == int((s * 4 >= s[0]).sum())
        if "error" in conditions:
            error = torch.linalg.norm(got[name] - product) / torch.linalg.norm(product)
            assert error <= 0.3
    if "size" in conditions:
        assert (tmp_path / "b.safetensors").stat().st_size <= 6000
        assert len(set(merged.ranks.values())) > 1


def test_without_conditions_nothing_is_lost(tmp_path: Path) -> None:
    """Not even where a LoRA was padded with zeros: its own rank comes out."""
    _, (one, two) = adapters(tmp_path, 2)
    merging.merge([one, two], method="task_arithmetic", output=tmp_path / "padded")
    assert load_file(tmp_path / "padded" / "adapter_model.safetensors").popitem()[1].shape.numel() % 8 == 0
    merged = merging.resize(tmp_path / "padded", output=tmp_path / "lora", dtype="float32")
    assert set(merged.ranks.values()) == {3}
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("padded", "lora")]
    before, after = map(products, files)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank 0", "--rank 0: should be at least 1"),
        ("--energy 0", "--energy 0.0: should be greater than 0 and at most 1"),
        ("--error 1", "--error 1.0: should be at least 0 and less than 1"),
        ("--sv-ratio 0 --rank 4", "--sv-ratio 0.0: should be at least 1"),
        ("--sv-ratio nan", "--sv-ratio nan: should be a finite number"),
    ],
)
def test_conditions_out_of_range(words: str, message: str, tmp_path: Path) -> None:
    given = diffusion_lora(tmp_path / "a.safetensors")
    run = CliRunner().invoke(cli, ["resize", str(given), *words.split(), "-o", str(tmp_path / "b.safetensors")])
    assert run.exit_code == 1 and run.stderr == f"Error: {message}\n"
    with pytest.raises(merging.OptionError, match=r"rank\.most = 0: should be at least 1$"):
        merging.Recipe(models=["a"], method="linear", rank={"most": 0})


def test_changes_of_0_are_named(tmp_path: Path) -> None:
    given = diffusion_lora(tmp_path / "a.safetensors")
    with pytest.raises(
        merging.InputError, match=r"^the merged change is 0 in all .*, or is their scale or weight 0\?$"
    ):
        merging.resize(given, output=tmp_path / "b.safetensors", scale=0)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": {"attn1": 0}},
        {"scale": {"ff.net": 0.5, "attn1": 1e-3}, "size": 2500},
        {"scale": {"attn1": 1e-3}, "size": 2500, "exclude": "ff.net"},
    ],
)
def test_names_hold_where_no_direction_is_left(tmp_path: Path, options: dict[str, Any]) -> None:
    """A pattern may name tensors whose change is 0, or too small for the budget."""
    given = diffusion_lora(tmp_path / "a.safetensors")
    merging.resize(given, output=tmp_path / "b.safetensors", **options)
    left = products(tmp_path / "b.safetensors")
    assert left and not any("attn1" in name for name in left)


def test_the_smallest_file_has_the_direction_of_most_energy(tmp_path: Path) -> None:
    given, out = diffusion_lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    scale = {"attn1.to_k": 1e-3}
    with pytest.raises(merging.InputError, match="the smallest file has") as error:
        merging.resize(given, output=out, scale=scale, size=1000, exclude="ff.net")
    smallest = int(str(error.value).split()[-2].replace(",", ""))
    merging.resize(given, output=out, scale=scale, size=smallest, exclude="ff.net")
    assert len(products(out)) == 1
    for size in range(smallest, smallest + 400, 40):
        merging.resize(given, output=out, scale=scale, size=size, exclude="ff.net", overwrite=True)
        assert not any("attn1.to_k" in name for name in products(out)), size


def test_full_models_are_extracted(tmp_path: Path) -> None:
    with pytest.raises(merging.InputError, match=r"base\.safetensors: is a full model: merging\.extract makes an adap"):
        merging.resize(unet_base(tmp_path / "base.safetensors"), rank=2, output=tmp_path / "b.safetensors")


def test_an_error_of_0_loses_nothing(tmp_path: Path) -> None:
    merged = merging.resize(diffusion_lora(tmp_path / "a.safetensors"), error=0, output=tmp_path / "b.safetensors")
    assert set(merged.ranks.values()) == {12}
    assert merging.Recipe(models=["a"], method="linear", rank={"error": 0}).to_dict()["rank"] == {"error": 0.0}


def test_an_exclusion_of_everything_is_named(tmp_path: Path) -> None:
    given = diffusion_lora(tmp_path / "a.safetensors")
    with pytest.raises(merging.MergingError, match="all changes are excluded, so that none is left to write"):
        merging.resize(given, output=tmp_path / "b.safetensors", exclude=["*"])


def test_blocks_are_scaled_or_left_out_and_formats_change(tmp_path: Path) -> None:
    given = diffusion_lora(tmp_path / "a.safetensors")
    arguments = ["--format", "kohya", "--scale", "attn1=0.5", "--scale", "ff.net=-1", "--exclude", "attn2"]
    output = tmp_path / "b.safetensors"
    with_base = unet_base(tmp_path / "base.safetensors")
    run = CliRunner().invoke(cli, ["resize", str(given), *arguments, "--base", str(with_base), "-o", str(output)])
    assert run.exit_code == 0, run.output
    wanted, got = products(given), products(output)
    flat = {f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}": value for name, value in wanted.items()}
    published = {name.rpartition("_0_")[2]: value for name, value in got.items()}
    scales = {"attn1_to_q": 0.5, "attn1_to_k": 0.5, "ff_net_2": -1.0}
    assert published.keys() == scales.keys()
    for name, scale in scales.items():
        (product,) = (value for key, value in flat.items() if key.endswith(name))
        assert torch.allclose(published[name], scale * product, atol=1e-4)


def unet_base(path: Path) -> Path:
    """The weights of the U-Net's modules, of Stable Diffusion as its other blocks say."""
    tensors = {f"unet.{UNET}.{module}.weight": torch.randn(24, 32) for module in MODULES}
    tensors["unet.down_blocks.0.attentions.0.proj_in.weight"] = torch.randn(4, 4)
    save_file(tensors, path)
    return path


def test_uniform_ranks(tmp_path: Path) -> None:
    given = diffusion_lora(tmp_path / "a.safetensors")
    one = merging.resize(given, energy=0.9, output=tmp_path / "one.safetensors")
    same = merging.resize(given, energy=0.9, uniform=True, output=tmp_path / "same.safetensors")
    assert set(same.ranks.values()) == {max(one.ranks.values())}
    assert all(same.discarded[name] <= one.discarded[name] for name in one.discarded)


def test_merge_takes_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--energy`` and ``--size`` of merge; an option of a method with the same name means the method's."""
    _, made = adapters(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in made]
    run = CliRunner().invoke(cli, ["-m", "linear", *names, "--energy", "0.5", "-o", "out", "--json"])
    assert run.exit_code == 0, run.output
    facts = json.loads(run.stdout)
    assert set(facts["ranks"].values()) <= {1, 2} and max(facts["discarded"].values()) <= 0.5
    recipe = ["-m", "linear", *names, "--size", "2KB", "--rank", "2", "--recipe-only"]
    stated = merging.load_recipe(CliRunner().invoke(cli, recipe).stdout).rank
    assert stated == merging.Recipe(models=("a",), method="linear", rank={"most": 2, "size": 2000}).rank
    svd = CliRunner().invoke(cli, ["-m", "svd", *names, "--energy", "0.5", "--recipe-only"])
    assert merging.load_recipe(svd.stdout).to_dict()["parameters"] == {"energy": 0.5}
    assert merging.load_recipe(svd.stdout).rank is None
