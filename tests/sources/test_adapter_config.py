"""Configs of adapters: what is missing is taken as PEFT takes it, and what is wrong is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.sources.changes import LoraChange
from support.small_adapter import FACTORS, small_adapter


def scale(path: Path) -> float:
    """The scale of the only change."""
    (change,) = open_model(path).changes.values()
    assert isinstance(change, LoraChange)
    return change.scale


def test_folder_without_config_is_an_adapter_with_a_notice(tmp_path: Path) -> None:
    opened = open_model(small_adapter(tmp_path / "a", None))
    assert opened.notices and "lora_alpha=" in opened.notices[0]
    assert scale(tmp_path / "a") == 1


def test_config_without_alpha_means_what_peft_makes_of_it(tmp_path: Path) -> None:
    assert scale(small_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2})) == 8 / 2


def test_dora_without_its_magnitudes_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="lora_magnitude_vector"):
        open_model(small_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}))


def test_magnitudes_of_other_outputs(tmp_path: Path) -> None:
    path = small_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "use_dora": True})
    magnitudes = {"base_model.model.layers.0.q.lora_magnitude_vector": torch.ones(3)}
    save_file(FACTORS | magnitudes, path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="3 magnitudes do not fit 4 outputs"):
        open_model(path)


@pytest.mark.parametrize("alpha", [1e999, 10**400, "4", True], ids=["infinite", "huge", "text", "flag"])
def test_alpha_that_is_none(tmp_path: Path, alpha: object) -> None:
    with pytest.raises(FormatError, match=r"lora_alpha of layers\.0\.q is .* should be a number"):
        open_model(small_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
