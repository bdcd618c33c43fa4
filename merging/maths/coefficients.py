"""The coefficients of models: one for all or one each, broadcast to the models' tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["cancel_out", "column", "mean_weights", "number", "spread"]


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


def mean_weights(weights: Sequence[Any]) -> list[Any]:
    """Return the weights divided by their sum."""
    total = sum(weights)
    return [weight / total for weight in weights]


def cancel_out(weights: Sequence[Any]) -> bool:
    """Return whether the weights sum to zero but for rounding, so that nothing can be divided by their sum."""
    numbers = list(map(number, weights))
    return abs(sum(numbers)) <= 1e-12 * sum(map(abs, numbers))


def column(value: Any, like: Tensor) -> Tensor:
    """Return one value a model as ``[n, 1, ...]``, to multiply ``like [n, *shape]`` with, with its gradient."""
    if isinstance(value, Tensor) and value.dim():
        flat = value.to(like)
    else:
        flat = torch.stack([torch.as_tensor(each, dtype=torch.float64).to(like) for each in spread(value, len(like))])
    return flat.view(-1, *[1] * (like.dim() - 1))
