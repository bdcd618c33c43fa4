"""Adapters of many ranks on disk, and their flat changes in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support import tiny

__all__ = [
    "F64",
    "SHAPES",
    "Adapter",
    "Factors",
    "agreement",
    "assert_near",
    "factors",
    "flat",
    "inner_products",
    "write",
    "write_base",
]

Factors = Mapping[str, tuple[Tensor, Tensor]]


Adapter = tuple[Path, dict[str, Tensor]]
"""A folder, and what lies in it as flat float64 matrices."""


SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 40),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.1.mlp.up_proj": (40, 16),
}


F64 = torch.float64


def factors(seed: int, rank: int, modules: Sequence[str] = tuple(SHAPES), size: float = 1.0) -> Factors:
    """Factors of float64 ``(B, A)`` by module, with a part that all seeds share, so that no angle is a right one."""
    random, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(-1)
    found = {}
    for name, (out, into) in SHAPES.items():
        common = torch.randn(out, 1, generator=shared, dtype=F64), torch.randn(1, into, generator=shared, dtype=F64)
        own = (torch.randn(side, generator=random, dtype=F64) for side in ((out, rank), (rank, into)))
        up, down = (each + 0.5 * part for each, part in zip(own, common, strict=True))
        found[name] = (size * up, down)
    return {name: found[name] for name in modules}


def write(folder: Path, changes: Factors, dtype: torch.dtype = F64, stored: float = 1.0, **config: Any) -> Path:
    """An adapter of PEFT's: by default its scale is 1. ``stored`` divides B, for a scale that says otherwise."""
    folder.mkdir(parents=True)
    ranks = {name: down.shape[0] for name, (_, down) in changes.items()}
    rank = max(ranks.values())
    settings: dict[str, Any] = {"r": rank, "lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks}
    settings |= {"peft_type": "LORA", "base_model_name_or_path": "org/base", "target_modules": list(changes)} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, (up, down) in changes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (up / stored).to(dtype).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def flat(models: Sequence[Factors]) -> list[Tensor]:
    """What each model changes, as one float64 vector over all tensors."""
    found = []
    for each in models:
        parts = [
            each[name][0] @ each[name][1] if name in each else torch.zeros(shape) for name, shape in SHAPES.items()
        ]
        found.append(torch.cat([part.double().flatten() for part in parts]))
    return found


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(vectors))
    return stacked @ stacked.mT


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    """Entries of a Gram matrix as shares of the norms; others as they are."""
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def write_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    random = torch.Generator().manual_seed(7)
    return tiny.save(
        folder,
        {f"{name}.weight": torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()},
    )


# -- signs -------------------------------------------------------------------------------------------------------------


def agreement(vectors: Sequence[Tensor]) -> Tensor:
    """Entry by entry, from the dense changes."""
    out = torch.full((len(vectors), len(vectors)), torch.nan, dtype=F64)
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors):
            both = (one != 0) & (other != 0)
            if bool(both.any()):
                out[i, j] = (one[both].sign() == other[both].sign()).double().mean()
    return out
