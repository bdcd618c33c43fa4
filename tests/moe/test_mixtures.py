"""Mixtures of dense experts: their tensors are their parents', they load and generate, and nothing wrong is written."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import merging
from merging.errors import MergingError
from support.dense_models import build_dense, save_dense
from support.tiny import identical, load

PARTS = ("gate_proj", "up_proj", "down_proj")
NUMBERS, ANIMALS = ["one two three", "five plus six is"], ["the cat sat", "a big dog ran in the park"]


def entries(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Experts of models, with prompts of their own."""
    prompts = [NUMBERS, ANIMALS, ["def x", "class y"]]
    return [
        {"source_model": str(folder / name), "positive_prompts": texts}
        for name, texts in zip(names, prompts, strict=False)
    ]


def recipe(folder: Path, *names: str, **settings: Any) -> dict[str, Any]:
    """A recipe with the base of a folder."""
    return {"base_model": str(folder / "base"), "experts": entries(folder, *(names or ("a", "b"))), **settings}


SHARED = {"source_model": "c", "positive_prompts": ["def x"], "residual_scale": 0.5}
MADE = {
    "mixtral": ("llama", {}, "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
    "mixtral-of-mistral": ("mistral", {}, "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
    "qwen2_moe": ("qwen2", {"shared_experts": [SHARED]}, "mlp.experts.{}.", PARTS),
    "qwen2_moe-of-llama": ("llama", {"shared_experts": [SHARED]}, "mlp.experts.{}.", PARTS),
    "qwen3_moe": ("qwen3", {}, "mlp.experts.{}.", PARTS),
    "deepseek": ("mistral", {"architecture": "deepseek"}, "mlp.experts.{}.", PARTS),
}


def with_shared(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose shared experts are models of a folder."""
    shared = [
        {**each, "source_model": str(folder / each["source_model"])} for each in settings.get("shared_experts", [])
    ]
    return {**settings, **({"shared_experts": shared} if shared else {})}


def test_the_example_runs(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in (("base", "base"), ("code", "a"), ("law", "b")):
        (tmp_path / name).symlink_to(dense / "llama" / model)
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(merging.make_moe, "make_moe", globs={})
    assert doctest.DocTestRunner(verbose=False).run(example) == (0, 4)


@pytest.mark.parametrize("name", MADE)
def test_experts_are_their_parents(dense: Path, tmp_path: Path, name: str) -> None:
    kind, settings, block, parts = MADE[name]
    folder = dense / kind
    made = merging.make_moe(recipe(folder, **with_shared(folder, settings)), tmp_path / "out")
    found, base = load(tmp_path / "out"), load(folder / "base")
    assert len(found) == made.tensors
    parents = [load(folder / each) for each in ("a", "b")]
    for layer in range(3):
        place = f"model.layers.{layer}."
        for index, parent in enumerate(parents):
            for part, dense_part in zip(parts, PARTS, strict=True):
                value = found.pop(f"{place}{block.format(index)}{part}.weight")
                assert torch.equal(value, parent[f"{place}mlp.{dense_part}.weight"])
        assert found.pop(f"{place}{block.partition('.')[0]}.gate.weight").shape == (2, 32)
        if "shared_experts" in settings:
            for part in PARTS:
                value = found.pop(f"{place}mlp.shared_expert.{part}.weight")
                scale = 0.5 if part == "down_proj" else 1
                assert torch.equal(value, load(folder / "c")[f"{place}mlp.{part}.weight"] * scale)
            assert found.pop(f"{place}mlp.shared_expert_gate.weight").shape == (1, 32)
    assert identical(found, {each: value for each, value in base.items() if ".mlp." not in each})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == name.partition("-")[0]


@pytest.mark.parametrize("name", [name for name in MADE if name != "deepseek"])
def test_a_mixture_of_copies_is_its_base(dense: Path, tmp_path: Path, name: str) -> None:
    """Whatever the routers say: so layout, config and attention are right. The shared expert is silent."""
    kind, settings, _, _ = MADE[name]
    folder = dense / kind
    shared = with_shared(folder, settings)
    for each in shared.get("shared_experts", []):
        each["residual_scale"] = 0
    merging.make_moe({**recipe(folder, "base", "base"), **shared}, tmp_path / "out")
    mixture, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = AutoTokenizer.from_pretrained(tmp_path / "out")("the small bird flew over the sea", return_tensors="pt")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder / "base")(**words).logits
        torch.testing.assert_close(mixture(**words).logits, expected, rtol=1e-4, atol=1e-4)
    assert mixture.generate(**words, max_new_tokens=3, do_sample=False).shape[1] == words["input_ids"].shape[1] + 3


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOWED = {"sliding_window": 4, "use_sliding_window": True}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "all windows": ("mistral", {"sliding_window": 4}),
    "all windows of Qwen3": ("qwen3", {**WINDOWED, "max_window_layers": 0}),
    "some windows": ("qwen2", {**WINDOWED, "max_window_layers": 1}),
    "wide heads": ("mistral", {"head_dim": 16}),
    "biases": ("qwen3", {"attention_bias": True}),
    "scaled rotation": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "another activation": ("llama", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_base_are_kept(tmp_path: Path, name: str) -> None:
    """A mixture of copies gives the base's outputs, over more tokens than a window has."""
    kind, settings = SETTINGS[name]
    base = str(save_dense(tmp_path / "base", kind, **settings))
    values: dict[str, Any] = {"base_model": base, "experts": [{"source_model": base}] * 2, "gate_mode": "random"}
    if kind == "qwen2":
        values["shared_experts"] = [{"source_model": base, "residual_scale": 0}]
    merging.make_moe(values, tmp_path / "out")
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / each)(ids).logits for each in ("base", "out"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_windows_that_the_mixture_does_not_have(tmp_path: Path) -> None:
    base = str(save_dense(tmp_path / "base", "qwen3", **WINDOWED, max_window_layers=1))
    with pytest.raises(MergingError, match="2 of its 3 layers to a window, and a Qwen3-MoE mixture can do so in all"):
        merging.make_moe(
            {"base_model": base, "experts": [{"source_model": base}] * 2, "gate_mode": "random"}, tmp_path / "x"
        )


def test_old_configs_keep_what_their_type_assumes(tmp_path: Path) -> None:
    """A Llama config may leave out what Mixtral assumes otherwise: heads, rotary base, epsilon of norms."""
    left_out = ("num_key_value_heads", "rms_norm_eps", "rope_parameters", "head_dim", "tie_word_embeddings")
    folder = save_dense(tmp_path / "base", num_key_value_heads=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in left_out}))
    merging.make_moe({**recipe(tmp_path, "base", "base"), "gate_mode": "hidden"}, tmp_path / "out")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / each)(ids).logits for each in ("base", "out"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_types_scales_and_noise(dense: Path, tmp_path: Path) -> None:
    folder = dense / "llama"
    experts = entries(folder, "a", "b")
    experts[0] |= {"residual_scale": 0.25, "noise_scale": 0.5}
    values = {**recipe(folder), "experts": experts, "dtype": "bfloat16"}
    merging.make_moe(values, tmp_path / "one", threads=1)
    merging.make_moe(values, tmp_path / "two", threads=3)
    found = load(tmp_path / "one")
    assert identical(found, load(tmp_path / "two"))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    parent = load(folder / "a")
    noise = (
        found["model.layers.1.block_sparse_moe.experts.0.w1.weight"].float()
        - parent["model.layers.1.mlp.gate_proj.weight"]
    )
    assert abs(float(noise.std()) - 0.5) < 0.03
    assert abs(float(noise.mean())) < 0.05
    plain = found["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    assert torch.equal(plain, load(folder / "b")["model.layers.1.mlp.down_proj.weight"].bfloat16())
    del experts[0]["noise_scale"]
    merging.make_moe(values, tmp_path / "three")
    scaled = load(tmp_path / "three")["model.layers.1.block_sparse_moe.experts.0.w2.weight"]
    assert torch.equal(scaled, (parent["model.layers.1.mlp.down_proj.weight"] * 0.25).bfloat16())
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    other = merging.make_moe(
        {**values, "experts": [{**experts[0], "noise_scale": 0.5}, experts[1]], "seed": 1}, tmp_path / "four"
    )
    name = "model.layers.0.block_sparse_moe.experts.0.w3.weight"
    assert other.bytes and not torch.equal(load(tmp_path / "four")[name], found[name])


def test_loras_are_experts(dense: Path, tmp_path: Path) -> None:
    """Alone on the base, and with + on any model: as PEFT would merge them into it."""
    from peft import LoraConfig, get_peft_model

    folder = dense / "llama"
    expected = {}
    for name in ("base", "c"):
        torch.manual_seed(7)
        targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / name), settings)
        adapted.save_pretrained(tmp_path / f"on-{name}")
        expected[name] = adapted.merge_and_unload().state_dict()
    experts = [
        {"source_model": str(tmp_path / "on-base"), "positive_prompts": NUMBERS},
        {"source_model": f"{folder / 'c'}+{tmp_path / 'on-c'}", "positive_prompts": ANIMALS},
    ]
    made = merging.make_moe({"base_model": str(folder / "base"), "experts": experts}, tmp_path / "out")
    found = load(tmp_path / "out")
    for index, parent in enumerate(expected.values()):
        for part, dense_part in zip(("w1", "w3", "w2"), PARTS, strict=True):
            value = found[f"model.layers.2.block_sparse_moe.experts.{index}.{part}.weight"]
            torch.testing.assert_close(value, parent[f"model.layers.2.mlp.{dense_part}.weight"], rtol=1e-6, atol=1e-6)
    assert torch.equal(
        found["model.layers.2.self_attn.q_proj.weight"], load(folder / "base")["model.layers.2.self_attn.q_proj.weight"]
    )
    assert sum("outside the MLPs" in notice for notice in made.notices) == 2


def test_a_base_with_a_lora(dense: Path, tmp_path: Path) -> None:
    """Its attention has the LoRA's change, and its prompts run through both."""
    from peft import LoraConfig, get_peft_model

    folder = dense / "llama"
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), settings)
    adapted.save_pretrained(tmp_path / "lora")
    save_dense(tmp_path / "merged", model=adapted.merge_and_unload())
    experts = entries(folder, "a", "b")
    merging.make_moe({"base_model": f"{folder / 'base'}+{tmp_path / 'lora'}", "experts": experts}, tmp_path / "one")
    merging.make_moe({"base_model": str(tmp_path / "merged"), "experts": experts}, tmp_path / "two")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_is_copied_as_it_is(dense: Path, tmp_path: Path) -> None:
    merging.make_moe(recipe(dense / "llama"), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense / "llama" / "base" / name).read_bytes()


KILLED = """
import os, signal, sys
import merging

def kill(done, total):
    if total > 9000 and done > total / 2:  # bytes, and not layers
        os.kill(os.getpid(), signal.SIGKILL)

merging.make_moe(sys.argv[1], sys.argv[2], progress=kill)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_run_leaves_no_output(dense: Path, tmp_path: Path) -> None:
    import yaml

    file, out = tmp_path / "moe.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe(dense / "llama")))
    done = subprocess.run([sys.executable, "-c", KILLED, str(file), str(out)], check=False)
    assert done.returncode == -9
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    merging.make_moe(file, out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["moe.yml", "out"]


def test_no_expert_is_held_in_memory(dense: Path) -> None:
    """A matrix passes in tiles; only one that a LoRA changes is made as a whole."""
    from merging.moe import preview_moe

    plan = preview_moe(recipe(dense / "llama"))
    assert max(part.memory for part in plan.parts) <= 3 * 4 * max(out.nbytes // 4 for out in plan.outs)


def test_models_that_do_not_fit(dense: Path, tmp_path: Path) -> None:
    wide = save_dense(tmp_path / "wide", intermediate_size=64)
    deep = save_dense(tmp_path / "deep", num_hidden_layers=4)
    biased = save_dense(tmp_path / "biased", attention_bias=True)
    gpt2 = build_dense("gpt2")
    save_dense(tmp_path / "gpt2", model=gpt2)
    llama, qwen3 = dense / "llama", dense / "qwen3"
    first = entries(llama, "a")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {**recipe(llama), "experts": [*first, {"source_model": str(wide), "positive_prompts": ["x"]}]},
            "is .64, 32., and",
        ),
        (
            {**recipe(llama), "experts": [*first, {"source_model": str(deep), "positive_prompts": ["x"]}]},
            "has 4 layers, and",
        ),
        (
            {**recipe(llama), "experts": [*first, {"source_model": str(qwen3 / "a"), "positive_prompts": ["x"]}]},
            "of type qwen3",
        ),
        ({**recipe(llama), "base_model": str(biased)}, "_proj.bias has no place in a Mixtral mixture"),
        ({**recipe(llama), "base_model": str(tmp_path / "gpt2")}, "of type gpt2: mixtures are made of llama"),
        ({**recipe(llama), "base_model": str(tmp_path / "none")}, "there is no such file or folder"),
        (recipe(dense / "qwen2"), "has a shared expert that every token reaches: add shared_experts"),
        ({**recipe(llama), "architecture": "qwen3"}, "Qwen3-MoE is made of qwen3 models"),
    ]
    for values, message in cases:
        with pytest.raises(MergingError, match=message):
            merging.make_moe(values, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gate_mode", ["random", "smile"])
def test_values_that_no_model_can_use(dense: Path, tmp_path: Path, gate_mode: str) -> None:
    for value, dtype, message in (
        (float("nan"), None, "not finite"),
        (1e6, "float16", "float16 cannot hold"),
    ):
        model = AutoModelForCausalLM.from_pretrained(dense / "llama" / "a")
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        save_dense(tmp_path / "broken", model=model)
        experts = [{"source_model": str(tmp_path / "broken")}, {"source_model": str(dense / "llama" / "b")}]
        values = {
            "base_model": str(dense / "llama" / "base"),
            "gate_mode": gate_mode,
            "experts": experts,
            "dtype": dtype,
        }
        with pytest.raises(MergingError, match=message):
            merging.make_moe(values, tmp_path / "out")
        assert sorted(each.name for each in tmp_path.iterdir()) == ["broken"]


def test_an_output_that_exists(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(MergingError, match="out"):
            merging.make_moe(recipe(dense / "llama"), tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    with pytest.raises(MergingError, match="would replace the input"):
        merging.make_moe(recipe(dense / "llama"), dense / "llama" / "a", overwrite=True)
    with pytest.raises(MergingError, match="a mixture is a folder"):
        merging.make_moe(recipe(dense / "llama"), tmp_path / "out.safetensors")
