"""PEFT's adapters: every kind that can be read changes its base as PEFT's own merge does, every other is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import QUIRKS, assert_close, baked, base_state, save_base, train

import merging

pytestmark = QUIRKS

LLAMA, BERT, GPT2 = ["q_proj", "k_proj", "up_proj"], ["query", "value"], ["c_attn", "c_proj"]

KINDS: dict[str, tuple[str, list[str] | str, dict[str, Any]]] = {
    "linear": ("llama", LLAMA, {}),
    "regex targets": ("llama", r".*layers\.1\..*(q|down)_proj", {}),
    "rslora": ("llama", LLAMA, {"use_rslora": True}),
    "patterns": (
        "llama",
        LLAMA,
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.layers.1.mlp.up_proj": 7, "q_proj": 3},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.k_proj": 9, "up_proj": 1},
        },
    ),
    "rslora patterns": ("llama", LLAMA, {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 2}}),
    "moe router": ("mixtral", ["q_proj", "v_proj"], {}),
    "t5": ("t5", ["q", "v", "wo"], {}),
    "Conv1D": ("gpt2", GPT2, {"fan_in_fan_out": True}),
    "embedding": ("bert", ["word_embeddings", "value"], {}),
    "conv2d": ("vit", ["projection"], {}),
    "conv2d stack": ("resnet", ["convolution"], {"use_rslora": True}),
    "conv1d": ("whisper", ["conv1", "conv2", "fc1"], {}),
    "lora_bias": ("bert", BERT, {"lora_bias": True}),
    "bias all": ("whisper", ["q_proj", "fc1"], {"bias": "all"}),
    "bias lora_only": ("bert", BERT, {"bias": "lora_only"}),
    "modules_to_save": ("convnext", ["pwconv1", "pwconv2"], {"modules_to_save": ["classifier"]}),
    "head saved": ("llama", LLAMA, {"modules_to_save": ["lm_head"]}),
    "DoRA": ("llama", LLAMA, {"use_dora": True}),
    "DoRA Conv1D": ("gpt2", GPT2, {"use_dora": True, "fan_in_fan_out": True}),
    "DoRA embedding": ("bert", ["word_embeddings"], {"use_dora": True}),
    "DoRA conv2d": ("vit", ["projection"], {"use_dora": True}),
    "PiSSA": ("llama", LLAMA, {"init_lora_weights": "pissa"}),
    "PiSSA rslora": ("llama", LLAMA, {"init_lora_weights": "pissa", "use_rslora": True}),
    "PiSSA Conv1D": ("gpt2", GPT2, {"init_lora_weights": "pissa", "fan_in_fan_out": True}),
    "OLoRA": ("llama", LLAMA, {"init_lora_weights": "olora"}),
    "gaussian": ("llama", LLAMA, {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", LLAMA, {"init_lora_weights": "orthogonal"}),
    "bfloat16": ("llama", LLAMA, {"dtype": torch.bfloat16}),
    "float16": ("bert", BERT, {"dtype": torch.float16, "lora_bias": True}),
    "pickle": ("bert", BERT, {"pickle": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_baked_in_is_what_peft_bakes_in(tmp_path: Path, kind: str) -> None:
    """Every tensor within 1e-5 of PEFT's merge_and_unload, and some tensor far from the base."""
    name, targets, config = KINDS[kind]
    base = save_base(tmp_path / "base", name)
    adapter = train(tmp_path / "adapter", base, 1, targets, **config)
    out = tmp_path / "out"
    merging.merge([adapter], method="task_arithmetic", base=base, kind="model", output=out)
    wanted, before = baked(base, adapter), base_state(base)
    assert_close(base_state(out), wanted)
    assert max(float((wanted[key] - before[key]).abs().max()) for key in before) > 0.01
