"""The coefficients of models: one for all or one each, broadcast to the models' tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["column", "number", "spread"]


def spread(value: Any, models: int) -> list[Any]:
    """Return one value a model, from one for all, a sequence of as many, or a tensor ``[n]``."""
    if isinstance(value, Tensor) and value.dim():
        return list(value.unbind())
    if isinstance(value, Sequence):
        return list(value)
    return [value] * models


def number(value: float | Tensor) -> float:
    """Return the value of a coefficient, without its gradient."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def column(value: Any, like: Tensor) -> Tensor:
    """Return one value a model as ``[n, 1, ...]``, to multiply ``like [n, *shape]`` with, with its gradient."""
    if isinstance(value, Tensor) and value.dim():
        flat = value.to(like)
    else:
        flat = torch.stack([torch.as_tensor(each, dtype=torch.float64).to(like) for each in spread(value, len(like))])
    return flat.view(-1, *[1] * (like.dim() - 1))
