"""The language part of a vision-language model, merged with a plain language model and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import merging

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2_5_VL": {"language": "Qwen2", "text": {}, "vision": {}},
    "Qwen3VL": {"language": "Qwen3", "text": {"head_dim": 8}, "vision": {"deepstack_visual_indexes": [0]}},
}


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A vision-language model, and two language models of its shape."""
    family = FAMILIES[request.param]
    text = {**TEXT, **family["text"]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        text_config={**text, "rope_scaling": rope},
        vision_config={**VISION, **family["vision"]},
        tie_word_embeddings=False,
    )
    getattr(transformers, f"{request.param}ForConditionalGeneration")(config).save_pretrained(tmp_path / "vlm")
    language = getattr(transformers, f"{family['language']}Config")(**text, tie_word_embeddings=False)
    for name in ("llm", "math"):
        getattr(transformers, f"{family['language']}ForCausalLM")(language).save_pretrained(tmp_path / name)
    return tmp_path / "vlm", tmp_path / "llm", tmp_path / "math"


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def plain(name: str) -> str:
    return name.replace("language_model.", "")


def test_language_parts_are_averaged_and_the_vision_tower_stays(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    vlm, llm, _ = pair
    merging.merge([vlm, llm], method="linear", on_mismatch="base", output=tmp_path / "out")
    merged, seen, language = tensors(tmp_path / "out"), tensors(vlm), tensors(llm)
    assert merged.keys() == seen.keys()
    assert {plain(name) for name in merged if "visual" not in name} == language.keys()
    for name, value in merged.items():
        wanted = seen[name] if "visual" in name else (seen[name] + language[plain(name)]) / 2
        torch.testing.assert_close(value, wanted)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert loaded(input_ids=torch.arange(6)[None]).logits.isfinite().all()


def test_the_language_part_comes_out_alone(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    vlm, llm, _ = pair
    merging.merge([llm, vlm], method="linear", on_mismatch="base", output=tmp_path / "out")
    seen = {plain(name): value for name, value in tensors(vlm).items()}
    for name, value in tensors(llm).items():
        torch.testing.assert_close(tensors(tmp_path / "out")[name], (value + seen[name]) / 2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded(input_ids=torch.arange(6)[None]).logits.isfinite().all()


def test_the_change_of_a_language_model_is_added(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    vlm, llm, math = pair
    options: dict[str, Any] = {"weights": [1, 1, -1], "normalize": False, "on_mismatch": "base"}
    merging.merge([vlm, math, llm], method="linear", output=tmp_path / "out", **options)
    change = {name: value - tensors(llm)[name] for name, value in tensors(math).items()}
    for name, value in tensors(tmp_path / "out").items():
        torch.testing.assert_close(value, tensors(vlm)[name] + change.get(plain(name), 0))
