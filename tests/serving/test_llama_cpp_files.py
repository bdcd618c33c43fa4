"""GGUF files against llama.cpp: models and LoRAs of its own converters are read, and LoRAs of ours are served by it.

``LLAMA_CPP_PYTHON`` names a Python that has llama.cpp (tests/peer/llama_cpp.txt).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import merging
from support.adapters import QUIRKS, peft, quiet, reload, train
from support.architectures import DECODER, EXPERTS, HEAD, tiny
from support.paths import TESTS

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not os.environ.get("LLAMA_CPP_PYTHON"), reason="LLAMA_CPP_PYTHON names no Python"),
    pytest.mark.filterwarnings("ignore:.*target_parameters.*"),
    *QUIRKS,
]

PROMPT = [3, 5, 7, 11]
EQUAL = 1e-3
"""How far the log-probabilities of the same adapter may be apart."""

ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 16}
MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def case(name: str, targets: list[str], *groups: dict[str, Any], kind: str = "Config", **config: Any) -> Any:
    return tiny(f"{name}{kind}", f"{name.removesuffix('Text')}ForCausalLM", DECODER, *groups, **config), targets


CASES: dict[str, tuple[Any, list[str]]] = {
    "llama": case("Llama", [*MLP, "lm_head", "embed_tokens"]),
    "llama-tied": case("Llama", MLP, tie_word_embeddings=True),
    "llama-biases": case("Llama", MLP, attention_bias=True),
    "llama3": case("Llama", MLP, {"head_dim": 16}, rope_parameters=ROPE, max_position_embeddings=131072),
    "mistral": case("Mistral", MLP),
    "mixtral": case("Mixtral", ["q_proj", "v_proj"], num_local_experts=4),
    "granite": case("Granite", MLP, attention_multiplier=0.3, logits_scaling=2.0, residual_multiplier=0.5),
    "qwen2": case("Qwen2", MLP),
    "qwen3": case("Qwen3", MLP, HEAD),
    "qwen2-moe": case("Qwen2Moe", MLP[:4], EXPERTS, shared_expert_intermediate_size=40),
    "qwen3-moe": case("Qwen3Moe", MLP[:4], HEAD, EXPERTS, norm_topk_prob=True),
    "gemma": case("Gemma", MLP, HEAD),
    "gemma2": case("Gemma2", MLP, HEAD, GEMMA),
    "gemma3": case("Gemma3Text", MLP, HEAD, GEMMA),
    "phi3": case("Phi3", ["qkv_proj", "gate_up_proj", "down_proj"], original_max_position_embeddings=64),
    "starcoder2": case("Starcoder2", ["q_proj", "c_fc"]),
    "cohere": case("Cohere", MLP),
    "nemotron": case("Nemotron", MLP),
    "olmo2": case("Olmo2", MLP),
    "gpt2": (
        tiny("GPT2Config", "GPT2LMHeadModel", vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_ctx=64),
        ["c_attn", "c_fc", "c_proj"],
    ),
}  # fmt: skip
PARTED = ("mixtral", "qwen3-moe")
"""Mixtures with an adapter of their experts."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By case the base, PEFT's adapter, ours of it in both forms, llama.cpp's files, and what it answers with each."""
    words: list[Path | str] = [os.environ["LLAMA_CPP_PYTHON"], TESTS / "peer" / "llama_cpp_runner.py"]
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, (build, targets) in CASES.items():
        folder = folders[name]
        with quiet():
            torch.manual_seed(7)
            build().save_pretrained(folder / "base")
            experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if name in PARTED else None
            more: dict[str, Any] = {"fan_in_fan_out": True} if name == "gpt2" else {}
            more |= {"target_parameters": experts} if experts else {}
            train(folder / "adapter", folder / "base", 1, targets, **more)
        options: dict[str, Any] = {"method": "passthrough", "base": folder / "base", "rank": 4}
        apart = {"experts": "apart"} if experts else {}
        merging.merge([folder / "adapter"], output=folder / "peft.folder", **apart, **options)
        merging.merge([folder / "adapter"], output=folder / "ours.gguf", format="gguf", **options)
        words += [folder / "out.json", folder / "base", folder / "peft.folder", folder / "ours.gguf", "--"]
    done = subprocess.run([str(word) for word in words[:-1]], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {name: json.loads((folder / "out.json").read_text()) for name, folder in folders.items()}
    return {name: (folders[name], {Path(path).name: each for path, each in answers[name].items()}) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_its_converter_comes_back(name: str, converted: dict[str, Any]) -> None:
    folder, _ = converted[name]
    merging.merge([folder / "out" / "base.gguf"], method="passthrough", output=folder / "read")
    given, found = (load_file(folder / each / "model.safetensors") for each in ("base", "read"))
    assert given.keys() == found.keys()
    assert all(torch.allclose(given[each], found[each], rtol=0, atol=1e-6) for each in given)
    tokens = torch.tensor([PROMPT])
    with quiet(), torch.no_grad():
        one, other = (reload(folder / each)(input_ids=tokens, use_cache=False).logits for each in ("base", "read"))
    assert (one - other).abs().max() < 1e-4


def tensors_of(path: Path) -> dict[str, Any]:
    return {each.name: (each.tensor_type, each.data) for each in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt2"])
def test_a_lora_has_the_bytes_of_its_converter(name: str, converted: dict[str, Any]) -> None:
    """GPT-2 is left out: the converter transposes its factors once too often."""
    folder, _ = converted[name]
    ours, theirs = tensors_of(folder / "ours.gguf"), tensors_of(folder / "out" / "peft.folder.gguf")
    assert ours.keys() == theirs.keys()
    for each, (kind, values) in theirs.items():
        assert kind == ours[each][0] and np.array_equal(values, ours[each][1]), each
    one, other = (gguf.GGUFReader(path).fields for path in (folder / "ours.gguf", folder / "out" / "peft.folder.gguf"))
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert one[key].contents() == other[key].contents()


@pytest.mark.parametrize("name", CASES)
def test_it_serves_our_loras_as_peft_does(name: str, converted: dict[str, Any]) -> None:
    folder, answers = converted[name]
    served = answers["ours.gguf"]
    assert isinstance(served, list), served
    assert isinstance(answers["base"], list), answers["base"]
    with quiet(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(reload(folder / "base"), folder / "adapter").eval()
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    wanted = torch.log_softmax(logits.double(), -1)
    assert (torch.tensor(served, dtype=torch.float64) - wanted).abs().max() < EQUAL
    assert (torch.tensor(answers["base"], dtype=torch.float64) - wanted).abs().max() > 10 * EQUAL


@pytest.mark.parametrize("name", CASES)
def test_a_lora_in_a_file_is_baked_as_peft_bakes_it(name: str, converted: dict[str, Any]) -> None:
    folder, _ = converted[name]
    for number, given in enumerate(("adapter", "ours.gguf")):
        merging.bake([folder / given], base=folder / "base", output=folder / str(number))
    one, other = (load_file(folder / each / "model.safetensors") for each in "01")
    assert all(torch.allclose(one[each], other[each], rtol=0, atol=1e-5) for each in one)
