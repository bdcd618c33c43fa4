"""Task vectors for tests, random and flat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import merging
from merging.maths.delta import Dense, LowRank
from merging.plan.items import TILE
from support.references import flatten

__all__ = [
    "CPU",
    "EXACT",
    "EXPERTS",
    "F32",
    "F64",
    "LARGE",
    "PLACES",
    "SHAPES",
    "K",
    "Q",
    "by_tensor",
    "changes",
    "close",
    "dense",
    "merged",
    "written",
]

F32, F64, CPU = torch.float32, torch.float64, torch.device("cpu")
EXPERTS, Q, K = "layers.0.mlp.experts.gate_up_proj", "layers.0.q.weight", "layers.1.k.weight"
SHAPES: Any = {Q: (40, 16), "embed_tokens.weight": (13, 7), "norm.weight": (1,), K: (16, 33), "layers.0.bias": (17,)}
LARGE: Any = {Q: (3, TILE // 2 + 1), K: (5, 77), "a.bias": (9,)}
PLACES: Any = SHAPES | {"layers.0.k.weight": (6, 9), "layers.1.q.weight": (7, 7), "patch.weight": (4, 3, 2, 2)}
PLACES |= {EXPERTS: (3, 5, 8)}
EXACT = (1.0, 0.5, -2.0)  # products with these weights are not rounded


def changes(n: int, seed: int = 0, dtype: torch.dtype = F32, shapes: Any = SHAPES) -> Any:
    """Task vectors with heavy tails."""
    random = torch.Generator().manual_seed(seed)
    draw = {name: torch.randn(n, *shape, generator=random, dtype=F64) ** 3 / 50 for name, shape in shapes.items()}
    return [{name: values[i].to(dtype) for name, values in draw.items()} for i in range(n)]


def dense(models: Any) -> Any:
    return [{name: Dense(value) for name, value in each.items()} for each in models]


def written(deltas: Any) -> Any:
    return [{name: delta.dense() for name, delta in each.items()} for each in deltas]


def merged(models: Any, method: str, **options: Any) -> Tensor:
    """The merged change, flat, in sorted key order; of tensors or of deltas."""
    deltas = models if isinstance(next(iter(models[0].values())), Dense | LowRank) else dense(models)
    return flatten(written([merging.merge_deltas(deltas, method=method, **options)]))[0]


def close(got: Tensor, wanted: Tensor, within: float = 1e-6) -> bool:
    return got.shape == wanted.shape and bool((got - wanted).norm() <= within * wanted.norm())


def by_tensor(models: Any, function: Any) -> Tensor:
    """A reference on each tensor alone, joined."""
    return torch.cat([function([{name: each[name]} for each in models]) for name in sorted(models[0])], -1)
