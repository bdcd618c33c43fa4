"""LoRAs out of full fine-tunes: what PEFT and diffusers make of them is the fine-tune again."""

from __future__ import annotations

import json
import re
import warnings
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import merging
from merging.cli.main import cli
from merging.errors import InputError, OptionError
from support import tiny
from support.adapters import QUIRKS, quiet
from support.diffusion_models import build, fused, quietly

pytestmark = [*QUIRKS, pytest.mark.filterwarnings("ignore::merging.errors.ResultWarning")]

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SHAPE),
    "tied": ("llama", {**SHAPE, "tie_word_embeddings": True}),
    "biases": ("qwen2", SHAPE),
    "conv1d": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 32}),
    "experts": ("mixtral", {**SHAPE, "num_local_experts": 4}),
    "positions": (
        "opt",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
         "word_embed_proj_dim": 32},
    ),
}  # fmt: skip


def make(folder: Path, name: str) -> tuple[Path, Path, PreTrainedModel]:
    """A base, a fine-tune of all of its parameters, and the fine-tune in memory."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", model


def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """The outputs of a model for ten tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(10)[None]).logits
    return found


@pytest.mark.parametrize("form", ["factors", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_makes_the_fine_tune_of_all_directions(tmp_path: Path, name: str, form: str) -> None:
    """Linear layers, embeddings, tied heads, biases, norms, GPT-2's transposed layers, experts."""
    base, tuned, model = make(tmp_path, name)
    options: dict[str, Any] = {"embeddings": form, "heads": form}
    merging.extract(tuned, base=base, energy=1, output=tmp_path / "lora", **options)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on tied layers, and on names in its own conversions
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        far = (logits(plain) - logits(model)).abs().max()
        loaded = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5 * far


def test_ranks_and_errors_are_those_of_the_svd(tmp_path: Path) -> None:
    base, (tuned,) = tiny.checkpoint(tmp_path, 1, width=24, vocab=40)
    merged = merging.extract(tuned, base=base, energy=0.7, dtype="float32", output=tmp_path / "lora")
    back = merging.merge([tmp_path / "lora"], method="passthrough", base=base, kind="model", output=tmp_path / "back")
    before, after, made = tiny.load(base), tiny.load(tuned), tiny.load(back.path)
    assert merged.ranks.keys() == {name for name, value in before.items() if value.dim() == 2}
    for name, rank in merged.ranks.items():
        change = after[name].double() - before[name].double()
        values = torch.linalg.svdvals(change).square()
        kept = values.cumsum(0) / values.sum()
        assert rank == int((kept < 0.7).sum()) + 1
        error = torch.linalg.norm(made[name].double() - after[name].double()) / torch.linalg.norm(change)
        assert float(error) == pytest.approx(sqrt(merged.discarded[name]), abs=1e-5)
        assert merged.discarded[name] == pytest.approx(1 - float(kept[rank - 1]), abs=1e-6)
    assert merged.rank == max(merged.ranks.values())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == merged.rank and config["rank_pattern"] == config["alpha_pattern"]
    ranks = {f"{name.removesuffix('.weight')}": rank for name, rank in merged.ranks.items() if rank != merged.rank}
    assert config["rank_pattern"] == ranks


@pytest.mark.parametrize("size", [9_000, 20_000, 40_000])
def test_the_file_has_the_size(tmp_path: Path, size: int) -> None:
    """And at the same number of bytes the error is below the error of one rank for all."""
    base, tuned = uneven(tmp_path)
    merged = merging.extract(tuned, base=base, size=size, norms="base", output=tmp_path / "lora")
    written = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert size - 1200 < written <= size
    same = merging.extract(tuned, base=base, size=size, uniform=True, norms="base", output=tmp_path / "same")
    assert (tmp_path / "same" / "adapter_model.safetensors").stat().st_size <= size
    assert len(set(same.ranks.values()) - {0}) == 1
    assert lost(merged, base, tuned) < 0.9 * lost(same, base, tuned)


def uneven(folder: Path) -> tuple[Path, Path]:
    """A base and a fine-tune that changed some tensors much more than others, and each in few directions mostly."""
    base = tiny.model(layers=4, width=32, vocab=40)
    random, tuned = torch.Generator().manual_seed(3), {}
    for place, (name, value) in enumerate(base.items()):
        tuned[name] = value
        if value.dim() == 2:
            u, s, vh = torch.linalg.svd(torch.randn(value.shape, generator=random), full_matrices=False)
            spectrum = torch.arange(1, len(s) + 1) ** -(0.3 + place % 3)
            tuned[name] = value + 0.1 * (place + 1) * (u * spectrum) @ vh
    return tiny.save(folder / "base", base), tiny.save(folder / "tuned", tuned)


def test_a_single_tensor_is_counted_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three changed much, one too little, one not at all."""
    base, name = tiny.model(width=16), "model.layers.{}.mlp.up_proj.weight"
    changed = {name.format(layer): base[name.format(layer)] + size for layer, size in ((0, 1.0), (1, 1e-3))}
    monkeypatch.chdir(tmp_path)  # names of folders count in the size
    tiny.save(Path("base"), base)
    tiny.save(Path("tuned"), {**base, **changed})
    small = merging.extract("tuned", base="base", include="up_proj", size=1800, output="lora")
    assert "1 tensor whose change is too small for the budget is left out" in small.notices
    assert "1 tensor that no model changed is left out" in small.notices


def lost(merged: merging.Merged, base: Path, tuned: Path) -> float:
    """The energy of the change that an adapter lacks."""
    before, after = tiny.load(base), tiny.load(tuned)
    total = 0.0
    for name, value in before.items():
        energy = float((after[name].double() - value.double()).square().sum())
        total += energy * merged.discarded.get(name, 1.0)
    return total


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"norms": "base"}])
def test_a_size_that_holds_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    """The message states the smallest size, which holds something."""
    base, tuned = uneven(tmp_path)
    given: dict[str, Any] = {"base": base, "output": tmp_path / "lora", **options}
    with pytest.raises(InputError, match=r"size= is too little: the smallest file has [\d,]+ bytes") as refused:
        merging.extract(tuned, size=300, **given)
    smallest = int("".join(filter(str.isdigit, str(refused.value).partition("bytes")[0])))
    with pytest.raises(InputError, match=re.escape(f"the smallest file has {smallest:,} bytes")):
        merging.extract(tuned, size=smallest - 1, **given)
    assert not (tmp_path / "lora").exists()
    merging.extract(tuned, size=smallest, **given)
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size == smallest


def test_unchanged_tensors_are_left_out(tmp_path: Path) -> None:
    base = tiny.model(width=16)
    tuned = {**base, "model.layers.1.mlp.up_proj.weight": base["model.layers.1.mlp.up_proj.weight"] + 1}
    tiny.save(tmp_path / "base", base)
    tiny.save(tmp_path / "tuned", tuned)
    merged = merging.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora")
    assert {name for name, rank in merged.ranks.items() if rank} == {"model.layers.1.mlp.up_proj.weight"}
    assert len(load_file(tmp_path / "lora" / "adapter_model.safetensors")) == 2
    assert merged.rank == 1
    with pytest.raises(InputError, match="nothing to write"):
        merging.extract(tmp_path / "base", base=tmp_path / "base", output=tmp_path / "none")


def test_parts_by_choice(tmp_path: Path) -> None:
    base, (tuned,) = tiny.checkpoint(tmp_path, 1, width=16)

    def names(**options: Any) -> set[str]:
        merging.extract(tuned, base=base, rank=2, output=tmp_path / "out.safetensors", overwrite=True, **options)
        return {
            name.removeprefix("base_model.model.").replace("model.", "", 1)
            for name in load_file(tmp_path / "out.safetensors")
        }

    everything = names()
    assert {"embed_tokens.lora_embedding_A", "lm_head.lora_A.weight", "norm.weight"} <= everything
    assert names(norms="base") == {name for name in everything if "norm" not in name}
    assert {"embed_tokens.weight"} == {name for name in names(embeddings="full") if "embed" in name}
    assert not {name for name in names(heads="base", embeddings="base") if "embed" in name or "head" in name}
    assert names(include="layers.1.mlp") == {f"layers.1.mlp.up_proj.lora_{side}.weight" for side in "AB"}
    assert names(include="mlp", exclude="layers.1") == {
        f"layers.{layer}.mlp.up_proj.lora_{side}.weight" for layer in (0, 2) for side in "AB"
    }


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_diffusers_makes_the_fine_tune(tmp_path: Path, family: str, format: str) -> None:
    """U-Nets with convolutions, text encoders, and a transformer, from folders of diffusers."""
    pipeline = build(family)
    with quietly():
        pipeline.save_pretrained(tmp_path / "base")
    part = "transformer" if family == "flux" else "unet"
    file = next((tmp_path / "base" / part).glob("*.safetensors"))
    random = torch.Generator().manual_seed(4)
    tuned = {
        name: value + 0.05 * torch.randn(value.shape, generator=random) if value.dim() > 1 else value
        for name, value in load_file(file).items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors", {"format": "pt"})
    options: dict[str, Any] = {"format": format, "energy": 1, "dtype": "float32"}
    merging.extract(tmp_path / "tuned.safetensors", base=file, output=tmp_path / "lora.safetensors", **options)
    lora = tmp_path / "lora.safetensors"
    given: dict[str, Any] = {"method": "passthrough", "base": file, "kind": "model"}
    baked = load_file(merging.merge([lora], output=tmp_path / "baked.safetensors", **given).path)
    for name, value in tuned.items():
        assert torch.allclose(baked[name], value, atol=2e-5), name
    if (family, format) == ("flux", "kohya"):
        return  # diffusers converts such a file by the sizes of the published model
    if format == "kohya":  # diffusers mixes up the alphas of modules of several ranks in Kohya's files
        merging.extract(tmp_path / "tuned.safetensors", base=file, output=lora, uniform=True, overwrite=True, **options)
    got = fused(build(family), lora)
    for name, value in tuned.items():
        assert torch.allclose(got[f"{part}.{name}"], value, atol=2e-5), name


def test_refusals(tmp_path: Path) -> None:
    base, (tuned,) = tiny.checkpoint(tmp_path, 1)
    other, _ = tiny.checkpoint(tmp_path / "other", 0, width=16)
    with pytest.raises(InputError, match="its tensors are not the tensors of"):
        merging.extract(tuned, base=other, output=tmp_path / "lora")
    with pytest.raises(InputError, match="an adapter comes out only when all inputs are adapters, or with base"):
        merging.merge([tuned], method="linear", base=base, kind="adapter", output=tmp_path / "lora")
    with pytest.raises(OptionError, match=r"^energy=2: should be greater than 0 and at most 1$"):
        merging.extract(tuned, base=base, energy=2, output=tmp_path / "lora")
    with pytest.raises(OptionError, match="'ranks' is not an option"):
        merging.extract(tuned, base=base, ranks=2, output=tmp_path / "lora")  # type: ignore[call-arg]


def test_merges_of_fine_tunes_become_adapters(tmp_path: Path) -> None:
    """Any method: the LoRA of a merge is the LoRA of the merged model, and threads change no byte."""
    base, tuned = tiny.checkpoint(tmp_path, 2, width=32, vocab=40)
    given: dict[str, Any] = {"method": "ties", "base": base, "density": 0.5}
    merging.merge(tuned, output=tmp_path / "model", **given)
    options: dict[str, Any] = {"kind": "adapter", "rank": {"energy": 0.9}, "dtype": "float32"}
    direct = merging.merge(tuned, output=tmp_path / "one.safetensors", threads=1, **given, **options)
    merging.extract(tmp_path / "model", base=base, energy=0.9, dtype="float32", output=tmp_path / "two.safetensors")
    merging.merge(tuned, output=tmp_path / "three.safetensors", threads=2, **given, **options)
    assert tiny.identical(load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "three.safetensors"))
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
    for name in direct.ranks:
        path = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{path}A.weight" in one:
            products = [each[f"{path}B.weight"] @ each[f"{path}A.weight"] for each in (one, two)]
            assert torch.allclose(*products, atol=1e-5)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.checkpoint(tmp_path, 1, width=16)
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(cli, ["extract", "tuned0", "--base", "base", "--sv-ratio", "3", "-o", "lora", "--json"])
    assert run.exit_code == 0, run.output
    facts = json.loads(run.stdout)
    assert facts["kind"] == "adapter" and max(facts["ranks"].values()) == facts["rank"]
    assert facts["discarded"].keys() == facts["ranks"].keys()
    run = CliRunner().invoke(cli, ["extract", "tuned0", "--base", "base", "--size", "4KB", "--recipe-only"])
    assert merging.load_recipe(run.stdout).to_dict() == {
        "models": ["tuned0"], "method": "passthrough", "base": "base", "as": "adapter", "rank": {"size": 4000}
    }  # fmt: skip
    run = CliRunner().invoke(cli, ["rerun", "lora", "-o", "again"])
    assert run.exit_code == 0, run.output
    assert tiny.identical(tiny.load(tmp_path / "lora"), tiny.load(tmp_path / "again"))
