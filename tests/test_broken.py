"""What a tester broke once, and must stay mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.errors import FormatError, InputError
from merging.sources import open_model
from merging.sources.adapter import LoraChange

FACTORS = {
    "base_model.model.layers.0.q.lora_A.weight": torch.ones(2, 4),
    "base_model.model.layers.0.q.lora_B.weight": torch.ones(4, 2),
}


def adapter(folder: Path, config: dict[str, object] | None) -> Path:
    """An adapter of one module, with or without a config."""
    folder.mkdir()
    save_file(FACTORS, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def scale(path: Path) -> float:
    """The scale of the only change."""
    (change,) = open_model(path).changes.values()
    assert isinstance(change, LoraChange)
    return change.scale


def test_folder_without_config_is_an_adapter_with_a_notice(tmp_path: Path) -> None:
    opened = open_model(adapter(tmp_path / "a", None))
    assert opened.notices and "--lora-alpha" in opened.notices[0]
    assert scale(tmp_path / "a") == 1


def test_config_without_alpha_means_what_peft_makes_of_it(tmp_path: Path) -> None:
    assert scale(adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2})) == 8 / 2


def test_dora_without_its_magnitudes_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="lora_magnitude_vector"):
        open_model(adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}))


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


def test_overflow_in_float32_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.full((4,), 3e38)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="beyond the range of F32"):
        merging.merge(
            [tmp_path / "a.safetensors"] * 2, method="linear", normalize=False, output=tmp_path / "out.safetensors"
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_key_twice_in_a_recipe() -> None:
    with pytest.raises(FormatError, match="'method' stands twice"):
        merging.load_recipe("models: [a]\nmethod: linear\nmethod: slerp\n")


def test_scalars_slerp() -> None:
    merged = merging.merge_state_dicts([{"s": torch.tensor(1.0)}, {"s": torch.tensor(3.0)}], method="slerp")
    assert float(merged["s"]) == 2
