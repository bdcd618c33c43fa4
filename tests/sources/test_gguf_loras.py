"""LoRAs in GGUF files: the change that PEFT's adapter makes, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import merging
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.sources import Adapter
from support.adapters import QUIRKS, quiet, save_base, train
from support.gguf_files import write_gguf_lora

pytestmark = QUIRKS

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"],
    "qwen2": ["q_proj", "up_proj", "embed_tokens"],
    "gemma2": ["k_proj", "gate_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_change_is_that_of_peft(name: str, tmp_path: Path) -> None:
    with quiet():
        base = save_base(tmp_path / "base", name)
        adapter = train(tmp_path / "adapter", base, 1, TARGETS[name], fan_in_fan_out=name == "gpt2")
    file = write_gguf_lora(tmp_path / "lora.gguf", adapter, base)
    for number, given in enumerate((adapter, file)):
        merging.merge([given], method="task_arithmetic", base=base, kind="model", output=tmp_path / str(number))
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in "01")
    assert all(torch.allclose(one[each], other[each], rtol=0, atol=1e-6) for each in one)
    merging.merge([file], method="passthrough", base=base, output=tmp_path / "again")
    given, back = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("adapter", "again"))
    assert {each for each in given if "lora_" in each} == back.keys()


def test_heads_are_of_the_base_or_of_the_file(tmp_path: Path) -> None:
    with quiet():
        base = save_base(tmp_path / "base", "llama")
        adapter = train(tmp_path / "adapter", base, 1, ["q_proj", "k_proj"])
    file = write_gguf_lora(tmp_path / "lora.gguf", adapter, base)
    with pytest.raises(InputError, match=r"orders the rows of queries and keys by heads.*: give the base with base="):
        merging.merge([file], method="passthrough", output=tmp_path / "out")
    stated = write_gguf_lora(tmp_path / "stated.gguf", adapter, base, heads=True)
    merging.merge([stated], method="passthrough", output=tmp_path / "out")
    given, back = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("adapter", "out"))
    for down in (name for name in given if "lora_A" in name):
        up = down.replace("lora_A", "lora_B")
        change, again = given[up] @ given[down], back[up] @ back[down]
        scale = (again * change).sum() / change.square().sum()
        assert torch.allclose(again, scale * change, atol=1e-5)
    config = json.loads((base / "config.json").read_text()) | {"num_attention_heads": 3}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match="has 32 rows, which do not make the 3 heads that the config of the base states"
    ):
        merging.merge([file], method="passthrough", base=base, output=tmp_path / "none")


def lora(path: Path, tensors: dict[str, tuple[int, ...]], arch: str = "qwen2", kind: str = "lora") -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, kind)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


UP = "blk.0.ffn_up.weight"
PAIR = {f"{UP}.lora_a": (2, 8), f"{UP}.lora_b": (6, 2)}
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str, str, str]] = {
    "one factor": ({f"{UP}.lora_a": (2, 8)}, "qwen2", "lora", "has one of its two factors only"),
    "ranks": ({f"{UP}.lora_a": (3, 8), f"{UP}.lora_b": (6, 2)}, "qwen2", "lora", "which do not fit together"),
    "other tensor": ({**PAIR, "surprise": (3,)}, "qwen2", "lora", "surprise is not a tensor that a LoRA of llama.cpp"),
    "other module": (
        {"blk.0.x.weight.lora_a": (2, 8), "blk.0.x.weight.lora_b": (6, 2)},
        "qwen2",
        "lora",
        "has no name",
    ),
    "other architecture": (PAIR, "rwkv6", "lora", "is a LoRA of the architecture 'rwkv6', and read are command-r"),
    "other adapter": (PAIR, "qwen2", "control_vector", "is a GGUF file of the type 'control_vector'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    tensors, arch, kind, words = REFUSED[case]
    with pytest.raises(FormatError, match=words):
        open_model(lora(tmp_path / "a.gguf", tensors, arch, kind))


def test_experts_and_norms(tmp_path: Path) -> None:
    """A stack holds the factors of each expert; a norm is saved in full, and Gemma's without the 1 added to it."""
    stack = "blk.1.ffn_up_exps.weight"
    opened = open_model(
        lora(tmp_path / "a.gguf", {f"{stack}.lora_a": (3, 2, 8), f"{stack}.lora_b": (3, 6, 2)}, "qwen3moe")
    )
    assert isinstance(opened, Adapter)
    assert list(opened.changes) == [f"model.layers.1.mlp.experts.{number}.up_proj.weight" for number in range(3)]
    assert {change.shape for change in opened.changes.values()} == {(6, 8)}
    opened = open_model(lora(tmp_path / "b.gguf", {**PAIR, "blk.0.attn_norm.weight": (8,)}, "gemma"))
    assert isinstance(opened, Adapter)
    norm = opened.changes["model.layers.0.input_layernorm.weight"]
    assert norm.needs_base and torch.equal(norm.tensors[0].read(), torch.zeros(8))


def test_a_norm_of_nemotron_has_a_bias_that_nothing_was_added_to(tmp_path: Path) -> None:
    norms = {f"blk.0.attn_norm.{leaf}": (8,) for leaf in ("weight", "bias")}
    opened = open_model(lora(tmp_path / "a.gguf", {**PAIR, **norms}, "nemotron"))
    assert isinstance(opened, Adapter)
    weight, bias = (opened.changes[f"model.layers.0.input_layernorm.{leaf}"].tensors[0] for leaf in ("weight", "bias"))
    assert torch.equal(weight.read(), torch.zeros(8))
    assert torch.equal(bias.read(), torch.ones(8))


def test_a_router_without_its_experts(tmp_path: Path) -> None:
    """llama.cpp calls Mixtral a llama, which has no router."""
    gate = "blk.0.ffn_gate_inp.weight"
    opened = open_model(lora(tmp_path / "a.gguf", {f"{gate}.lora_a": (2, 8), f"{gate}.lora_b": (4, 2)}, "llama"))
    assert isinstance(opened, Adapter)
    assert list(opened.changes) == ["model.layers.0.block_sparse_moe.gate.weight"]
