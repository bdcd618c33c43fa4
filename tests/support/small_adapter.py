"""An adapter of one module, of ones, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["FACTORS", "small_adapter"]

FACTORS = {
    "base_model.model.layers.0.q.lora_A.weight": torch.ones(2, 4),
    "base_model.model.layers.0.q.lora_B.weight": torch.ones(4, 2),
}


def small_adapter(folder: Path, config: dict[str, object] | None) -> Path:
    """An adapter of one module, with or without a config."""
    folder.mkdir()
    save_file(FACTORS, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
