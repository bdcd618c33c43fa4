"""Configs of models with values of wrong types are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merging.errors import FormatError
from merging.hub.open_model import open_model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", 3),
        ("architectures", {"0": "LlamaForCausalLM"}),
        ("model_type", ["llama"]),
        ("text_config", "x"),
        ("tie_word_embeddings", "no"),
        ("_name_or_path", "\ud800"),
    ],
)
def test_config_of_a_model_with_wrong_types(tmp_path: Path, field: str, value: object) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({field: value}))
    with pytest.raises(FormatError, match=r"config\.json: (.* should be|holds half a character)"):
        open_model(tmp_path)
