"""SMILE: equal to its definition, exact at full rank, from LoRAs as they are, loaded by transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import merging
from merging.errors import MergingError
from support.dense_models import build_dense, save_dense
from support.tiny import load

IDS = torch.arange(4, 24)[None]


@pytest.fixture(autouse=True)
def modules_of_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of mixtures is not copied into the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])


def tune(folder: Path, name: str, seed: int, kind: str = "llama", size: float = 0.05) -> Path:
    """A fine-tune of KIND/base in all linear layers, and in no other tensor, as float64."""
    model = build_dense(kind, 0).double()
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            for each in module.parameters():
                each.data += size * torch.randn(each.shape, generator=random, dtype=torch.float64)
    return save_dense(folder / name, model=model)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders KIND/base, KIND/a and KIND/b, the latter two fine-tunes of the first."""
    folder = tmp_path_factory.mktemp("family")
    for kind in ("llama", "qwen2"):
        save_dense(folder / kind / "base", model=build_dense(kind, 0).double())
        for seed, name in enumerate("ab", 1):
            tune(folder / kind, name, seed, kind)
    return folder


def mix(folder: Path, out: Path, *names: str, **settings: Any) -> Any:
    """The mixture of fine-tunes, as transformers loads it."""
    experts = [{"source_model": str(folder / name)} for name in names or ("a", "b")]
    values = {"base_model": str(folder / "base"), "gate_mode": "smile", "experts": experts, **settings}
    merging.make_moe(values, out)
    mixture, loading = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return mixture


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("rank", "gate_rank", "chosen"), [(5, 3, 1), (3, 5, 2), ("full", 4, 2)])
def test_it_is_its_definition(family: Path, tmp_path: Path, rank: Any, gate_rank: int, chosen: int) -> None:
    """In float64, layer by layer, with torch's own SVD; qwen2 has biases."""
    folder = family / "qwen2"
    mixture = mix(folder, tmp_path / "out", rank=rank, gate_rank=gate_rank, experts_per_token=chosen)
    base, tuned = load(folder / "base"), [load(folder / name) for name in "ab"]
    linears = {name: module for name, module in mixture.named_modules() if type(module).__name__ == "SmileLinear"}
    assert len(linears) == 3 * 7 + 1
    for name, module in linears.items():
        x = torch.randn(6, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        weight, bias = base[f"{name}.weight"], base.get(f"{name}.bias", torch.zeros(()))
        norms, changes = [], []
        for each in tuned:
            u, s, vh = torch.linalg.svd(each[f"{name}.weight"] - weight, full_matrices=False)
            kept = len(s) if rank == "full" else rank
            norms.append((x @ vh[:gate_rank].T).norm(dim=-1))
            change = (u[:, :kept] * s[:kept]) @ vh[:kept]
            changes.append(x @ change.T + each.get(f"{name}.bias", torch.zeros(())) - bias)
        largest, picked = torch.stack(norms, -1).topk(chosen, -1)
        shares = torch.zeros(6, 2, dtype=torch.float64).scatter(-1, picked, largest.softmax(-1))
        expected = x @ weight.T + bias + sum(shares[:, [i]] * change for i, change in enumerate(changes))
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("right", [0, 1])
def test_at_full_rank_it_is_each_fine_tune(family: Path, tmp_path: Path, right: int) -> None:
    """With the other expert's router silent, so that the right one is chosen."""
    folder = family / "qwen2"
    mixture = mix(folder, tmp_path / "out", rank="full")
    for name, parameter in mixture.named_parameters():
        if name.endswith("smile_down"):
            parameter.data[1 - right] = 0
    expected = logits(AutoModelForCausalLM.from_pretrained(folder / "ab"[right]))
    torch.testing.assert_close(logits(mixture), expected, rtol=1e-8, atol=1e-8)


def test_loras_as_they_are(tmp_path: Path) -> None:
    """Their own rank and directions, and alone the model that PEFT makes."""
    from peft import LoraConfig, get_peft_model

    save_dense(tmp_path / "base")
    for seed, rank in enumerate((3, 5)):
        torch.manual_seed(seed)
        settings = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings)
        adapted.save_pretrained(tmp_path / f"lora{rank}")
        torch.save(adapted.merge_and_unload().state_dict(), tmp_path / f"merged{rank}.pt")
    mixture = mix(tmp_path, tmp_path / "out", "lora3", "lora5")
    found, base = load(tmp_path / "out"), load(tmp_path / "base")
    assert sum(name.endswith("smile_up") for name in found) == 2 * 3
    for index, rank in enumerate((3, 5)):
        merged = torch.load(tmp_path / f"merged{rank}.pt")
        for place in ("self_attn.q_proj", "mlp.up_proj"):
            name = f"model.layers.1.{place}"
            up, down = found[f"{name}.smile_up"][index], found[f"{name}.smile_down"][index]
            assert up.shape[1] == 5 and down.shape[0] == 5
            assert not down[rank:].any()
            change = merged[f"{name}.weight"] - base[f"{name}.weight"]
            torch.testing.assert_close(up @ down, change, rtol=1e-4, atol=1e-5)
    alone = mix(tmp_path, tmp_path / "alone", "lora5")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected.load_state_dict(torch.load(tmp_path / "merged5.pt"))
    torch.testing.assert_close(logits(alone), logits(expected), rtol=1e-4, atol=1e-4)
    assert mixture.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_peft_routes_loras_alike(tmp_path: Path) -> None:
    """PEFT's Arrow routing of the LoRAs themselves is this mixture with one direction a router."""
    from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model

    save_dense(tmp_path / "base")
    for seed in (1, 2):
        torch.manual_seed(seed)
        settings = LoraConfig(r=2, target_modules=["down_proj", "v_proj"], init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings)
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.data[0] *= 20  # one direction stands out, as PEFT finds it by 15 steps of power iteration
        adapted.save_pretrained(tmp_path / f"lora{seed}")
    mixture = mix(tmp_path, tmp_path / "out", "lora1", "lora2", gate_rank=1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    arrow = create_arrow_model(
        base, [str(tmp_path / "lora1"), str(tmp_path / "lora2")], ArrowConfig(top_k=1, rng_seed=0)
    )
    torch.testing.assert_close(logits(mixture), logits(arrow.eval()), rtol=1e-3, atol=1e-3)


@pytest.mark.exhaustive
def test_it_loads_without_this_package(family: Path, tmp_path: Path) -> None:
    """In a process that cannot import it; and never as the base alone."""
    mix(family / "llama", tmp_path / "out", dtype="bfloat16", rank=4)
    script = (
        "import sys; sys.modules['merging'] = None; import torch, transformers; "
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "print(m.generate(torch.arange(4, 9)[None], max_new_tokens=2, do_sample=False).shape[1], m.dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], check=True, capture_output=True, text=True
    )
    assert done.stdout == "7 torch.bfloat16\n"
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_tensors_that_are_no_linear_layers(family: Path, tmp_path: Path) -> None:
    folder = family / "llama"
    for name in "cd":
        model = AutoModelForCausalLM.from_pretrained(folder / "a")
        model.model.embed_tokens.weight.data += ord(name)
        save_dense(tmp_path / name, model=model)
    experts = [{"source_model": str(tmp_path / name)} for name in "cd"]
    values = {"base_model": str(folder / "base"), "gate_mode": "smile", "experts": experts, "rank": 2}
    made = merging.make_moe(values, tmp_path / "base")
    assert any("outside linear layers" in each for each in made.notices)
    name = "model.embed_tokens.weight"
    assert torch.equal(load(tmp_path / "base")[name], load(folder / "base")[name])
    merging.make_moe({**values, "others": "average"}, tmp_path / "average")
    mean = (load(tmp_path / "c")[name] + load(tmp_path / "d")[name]) / 2
    assert torch.equal(load(tmp_path / "average")[name], mean)


def test_other_models(tmp_path: Path) -> None:
    """A classifier of BERT: what it is loaded by is in its config."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=60, **shape)
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    tuned = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    for module in tuned.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data += 0.1 * torch.randn(module.weight.shape)
    tuned.save_pretrained(tmp_path / "a")
    values = {
        "base_model": str(tmp_path / "base"),
        "gate_mode": "smile",
        "experts": [{"source_model": str(tmp_path / "a")}],
    }
    merging.make_moe({**values, "rank": "full"}, tmp_path / "out")
    classes = transformers.AutoModelForSequenceClassification
    found = classes.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, tuned.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_it_refuses(family: Path, tmp_path: Path) -> None:
    folder = family / "llama"
    gpt2 = save_dense(tmp_path / "gpt2", model=build_dense("gpt2"))
    bare = save_dense(tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysModel"]}))
    deep = save_dense(tmp_path / "deep", num_hidden_layers=4)
    narrow = save_dense(tmp_path / "narrow", intermediate_size=40)
    cases = [
        (gpt2, gpt2, "no expert changes a linear layer"),
        (bare, folder / "a", "NobodysModel, which transformers has no class of its own for"),
        (folder / "base", deep, "deep: has model.layers.3"),
        (folder / "base", narrow, "down_proj.weight is .32, 40., and"),
    ]
    for base, expert, message in cases:
        values = {"base_model": str(base), "gate_mode": "smile", "experts": [{"source_model": str(expert)}]}
        with pytest.raises(MergingError, match=message):
            merging.make_moe(values, tmp_path / "out")
    assert not (tmp_path / "out").exists()
