"""Models that cannot be merged with each other are refused by the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.errors import FormatError, InputError
from support.small_adapter import small_adapter


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"tie_word_embeddings": False}, {}])
def test_missing_head_is_an_error_unless_it_is_tied(tmp_path: Path, config: dict[str, object]) -> None:
    embedding = {"model.embed_tokens.weight": torch.ones(3, 2)}
    for name, tensors in (("full", {**embedding, "lm_head.weight": torch.ones(3, 2)}), ("headless", embedding)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"headless lacks lm_head\.weight"):
        merging.preview([tmp_path / "full", tmp_path / "headless"], method="linear")


def test_nothing_to_merge_is_said(tmp_path: Path) -> None:
    save_file({"codes": torch.ones(3, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="nothing to merge"):
        merging.preview([tmp_path / "a.safetensors"], method="linear")


def test_config_of_more_layers_than_there_are(tmp_path: Path) -> None:
    """transformers would begin to make them all."""
    save_file({"model.embed_tokens.weight": torch.ones(3, 2), "w": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = small_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2})
    with pytest.raises(FormatError, match="num_hidden_layers is 1000000000, and its weights are 2 tensors"):
        merging.preview([path], method="linear", base=tmp_path)
