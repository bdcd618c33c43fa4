"""Task vectors as flat rows, and sums over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

__all__ = ["add_up", "column", "flatten", "min_max", "unflatten"]


def flatten(models: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """One row `[d]` a model: its tensors flattened and joined in sorted key order."""
    return torch.stack([torch.cat([model[key].flatten() for key in sorted(model)]) for model in models])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one row of `flatten`, in the shapes of `like`."""
    pieces = vector.split([like[key].numel() for key in sorted(like)])
    return {key: piece.reshape(like[key].shape) for key, piece in zip(sorted(like), pieces, strict=True)}


def add_up(terms: Iterable[Tensor]) -> Tensor:
    """The sum over models: first + second, + third, ..."""
    return reduce(torch.add, terms)


def column(tau: Tensor, weights: Sequence[float] | None) -> Tensor:
    """The weights of the models `[n, 1]`, all 1 unless given."""
    return tau.new_tensor([1.0] * len(tau) if weights is None else weights)[:, None]


def min_max(x: Tensor) -> Tensor:
    """Min-max normalisation of every row to [0, 1]; 0 for a constant row."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return torch.where(high > low, (x - low) / (high - low), 0)
