"""Adapters carry the names that transformers gives tensors in memory, which are often not those on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import merging
from merging.errors import InputError
from support.architectures import build

DRIFTING = {
    "vit": ["q_proj", "v_proj"],
    "dinov2": ["q_proj"],
    "swin": ["o_proj"],
    "llava": ["q_proj", "v_proj"],
    "qwen2-vl": ["q_proj", "o_proj"],
    "gpt-neox": ["query_key_value"],
}


@pytest.mark.parametrize("architecture", DRIFTING)
def test_baked_adapter_equals_peft(architecture: str, tmp_path: Path) -> None:
    """On the base as it lies on disk, for architectures that transformers renames while loading."""
    model = build(architecture, 0, torch.float32)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=DRIFTING[architecture], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    merging.merge([tmp_path / "adapter"], method="task_arithmetic", base=tmp_path / "base", kind="model", output=out)
    expected = adapted.merge_and_unload().state_dict()
    got = type(model).from_pretrained(out).state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)


def test_unknown_architecture_is_refused_with_the_target(tmp_path: Path) -> None:
    """Where the library has no rules either, the target without a place is named."""
    model = build("bert", 0, torch.float32)
    model.save_pretrained(tmp_path / "base")
    other = get_peft_model(build("vit", 0, torch.float32), LoraConfig(r=4, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"q_proj\.weight is not a tensor of the base"):
        merging.preview([tmp_path / "adapter"], method="linear", base=tmp_path / "base")
