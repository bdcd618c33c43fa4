"""The models that stores are made of. None is changed by a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from support.adapters import deep_base, quiet, train
from support.stores import (
    Models,
)
from support.tiny import checkpoint, fine_tune, load

__all__ = ["full", "lora"]


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Full checkpoints."""
    return Models(*checkpoint(tmp_path_factory.mktemp("full"), 6))


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Adapters of a Llama: of different ranks, scales and targets, with a saved module, with DoRA; then full models."""
    root = tmp_path_factory.mktemp("lora")
    with quiet():
        base = deep_base(root / "base", 3)
        tuned = [
            train(root / "two", base, 1, ["q_proj", "v_proj"], r=3, use_rslora=True),
            train(root / "other", base, 2, ["q_proj", "up_proj"], r=2, lora_alpha=12),
            train(root / "apart", base, 3, ["k_proj", "down_proj"], r=2, rank_pattern={"layers.1.mlp.down_proj": 1}),
            train(root / "saved", base, 4, ["q_proj", "v_proj"], r=2, modules_to_save=["lm_head"]),
            train(root / "dora", base, 5, ["k_proj"], r=2, use_dora=True),
        ]
    for number in range(2):
        folder = Path(shutil.copytree(base, root / f"full{number}"))
        save_file(fine_tune(load(base), number, 0.002), folder / "model.safetensors", {"format": "pt"})
        tuned.append(folder)
    return Models(base, tuned)
