"""References applied to whole models: tensor by tensor, by the kind of each, and in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merging
from merging.maths.randomness import draw_mask
from support import references
from support.changes import CPU, EXACT, EXPERTS, F32, F64, PLACES, SHAPES, K, Q, by_tensor
from support.paths import SHIPPED
from support.references import flatten, ties

__all__ = [
    "MATRICES",
    "TABLE",
    "WITHOUT_CONV",
    "Function",
    "by_kind",
    "cancelling",
    "coarse",
    "core_ties",
    "doubles",
    "dtypes",
    "flat",
    "inner",
    "knots_ties",
    "mean",
    "on_flat",
    "places",
    "plus",
    "rows",
    "side_by_side",
    "thinned",
    "trained",
    "weighings",
    "weighted",
    "weights_merged",
    "within",
]

TABLE = "embed_tokens.weight"
MATRICES = (Q, K, "layers.0.k.weight", "layers.1.q.weight")
Function = Callable[[Tensor], Tensor]


def flat(function: Function) -> Any:
    """A reference on flat changes `[n, d]`, on each tensor alone."""
    return lambda models: by_tensor(models, lambda part: function(flatten(part)))


def rows(function: Function) -> Any:
    """A reference on the last axis of `[n, ..., c]`, on each tensor alone."""
    return lambda models: torch.cat([function(side_by_side(models, name)).flatten() for name in sorted(models[0])])


def side_by_side(models: Any, name: str) -> Tensor:
    return torch.stack([each[name] for each in models])


def by_kind(models: Any, matrix: Function, other: Function, tables: bool = False) -> Tensor:
    """A reference on matrices `[n, out, in]` and experts one by one, flat, and another one on all other tensors.

    With `tables` also on embeddings, whose inputs are their rows.
    """

    def one(name: str) -> Tensor:
        x = side_by_side(models, name)
        if name == EXPERTS:
            return torch.stack([matrix(expert) for expert in x.transpose(0, 1)])
        if name == TABLE and tables:
            return matrix(x.mT).mT
        return matrix(x) if name in MATRICES else other(x)

    return torch.cat([one(name).flatten() for name in sorted(models[0])])


def doubles(models: Any) -> Any:
    return [{name: value.double() for name, value in each.items()} for each in models]


def within(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == F32 else 1e-10


def places(method: str) -> Any:
    """The shapes to merge; numbers alone may be opposite, without a Karcher mean, or have many medians."""
    alone = () if method in ("karcher", "geometric_median") else ((1,),)
    return {name: shape for name, shape in PLACES.items() if shape != (1,) or shape in alone}


dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


def knots_ties(tau: Tensor, density: float = 0.2, scale: float = 1.0) -> Tensor:
    u, parts = references.knots(tau)
    merged_parts = ties(parts.flatten(1), density, scale=scale) if tau.any() else parts[0]
    return u @ merged_parts.view(parts.shape[1:])


def core_ties(tau: Tensor, density: float = 0.2, scale: float = 1.0) -> Tensor:
    u, v, parts = references.core(tau)
    merged_parts = ties(parts.flatten(1), density, scale=scale) if tau.any() else parts[0]
    return u @ merged_parts.view(parts.shape[1:]) @ v.T


def on_flat(function: Any, **options: Any) -> Function:
    return lambda tau: function(tau.flatten(1), **options).view(tau.shape[1:])


def mean(scale: float = 1.0) -> Function:
    return lambda x: scale * x.mean(0)


def weighted(x: Tensor) -> Tensor:
    return torch.tensordot(x.new_tensor(EXACT), x, 1)


def inner(function: Any, **options: Any) -> Function:
    return lambda tau: function(tau, **options)


def weights_merged(models: Any, method: str, **options: Any) -> Tensor:
    return flatten([merging.merge_state_dicts(models, method=method, **options)])[0]


def plus(base: Any, models: Any) -> Any:
    return [{name: base[name] + value for name, value in each.items()} for each in models]


WITHOUT_CONV: Any = {name: shape for name, shape in PLACES.items() if name != "patch.weight"}
weighings = pytest.mark.parametrize("weights", [{}, {"weights": EXACT}], ids=["plain", "weighted"])


@cache
def trained() -> Any:
    """One layer of the shipped adapters: 295,000 numbers each when written out."""
    adapters = []
    for folder in SHIPPED:
        state = load_file(folder / "adapter_model.safetensors")
        deltas = merging.peft_deltas(state, json.loads((folder / "adapter_config.json").read_text())).items()
        adapters.append({name: delta for name, delta in deltas if ".layer.3." in name})
    assert (len(adapters), len(adapters[0])) == (4, 2)
    return adapters


def coarse(models: Any) -> Any:
    return [{name: (value * 8).bfloat16().to(value) for name, value in each.items()} for each in models]


def cancelling(models: Any) -> Any:
    """Most entries of the first two models cancel out where the third has nothing, and the others are negative."""
    first, second, third = ({name: value.flatten().clone() for name, value in each.items()} for each in models)
    for name, value in first.items():
        value[::5].abs_().neg_()
        second[name] = -value
        second[name][::5], third[name][1::2] = value[::5], 0.0
    return [{name: value.view(SHAPES[name]) for name, value in each.items()} for each in (first, second, third)]


def thinned(models: Any, drop: float, rescale: Any, seed: int, keys: Any) -> Tensor:
    """The reference, tensor by tensor, with the masks that belong to these places: ``[n, d]``."""

    def one(part: Any) -> Tensor:
        tau, (name,) = flatten(part), part[0]
        mask = torch.stack([draw_mask(1 - drop, 0, tau.shape[1], CPU, seed, key, name) for key in keys])
        return references.dare(tau, mask, drop, rescale)

    return by_tensor(models, one)
