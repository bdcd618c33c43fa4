"""Small models by which the rates of a machine are measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from merging.maths.lazy_torch import Tensor, torch
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter

__all__ = ["WRITTEN", "write_models"]

WRITTEN = ("a", "b")
"""The fine-tunes of each base."""

_UP = "model.layers.{}.mlp.up_proj.weight"

_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {f"model.layers.{layer}.input_layernorm.weight": (64,) for layer in range(200)},
    "wide": {_UP.format(layer): (2048, 2048) for layer in range(2)},
    "square": {_UP.format(layer): (1024, 768) for layer in range(2)},
    "lora": {_UP.format(layer): (1024, 768) for layer in range(12)},
}
"""The shapes of the tensors of each model: many small ones, large ones, decomposed ones, and LoRAs."""

_RANK = 16


def write_models(folder: Path) -> None:
    """Write bases and fine-tunes (``wide-base.safetensors``, ``wide-a.safetensors``), and LoRAs (``lora-a/``)."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int, size: float) -> Tensor:
        return size * torch.randn(shape, generator=random)

    for model, shapes in _SHAPES.items():
        base = {name: draw(*shape, size=0.02) for name, shape in shapes.items()}
        _save(folder, f"{model}-base", base)
        for name in WRITTEN if model != "lora" else ():
            _save(
                folder, f"{model}-{name}", {key: value + draw(*value.shape, size=0.002) for key, value in base.items()}
            )
    for name in WRITTEN:
        _write_lora(folder / f"lora-{name}", draw)


def _write_lora(folder: Path, draw: Callable[..., Tensor]) -> None:
    factors = {}
    for name, (rows, columns) in _SHAPES["lora"].items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = draw(_RANK, columns, size=0.02)
        factors[f"{module}.lora_B.weight"] = draw(rows, _RANK, size=0.02)
    folder.mkdir()
    _save(folder, "adapter_model", factors)
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _save(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    outs = [OutputTensor(name, "BF16", tuple(value.shape)) for name, value in tensors.items()]
    writer = TensorWriter(folder, stem, outs, {"format": "pt"}, None)
    for name, value in tensors.items():
        writer.write(name, value.to(torch.bfloat16).reshape(-1))
    writer.finish()
