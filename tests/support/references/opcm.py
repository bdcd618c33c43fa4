"""OPCM by its released code and by its paper."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from support.references.flat import flatten

__all__ = ["opcm"]


def _projection(new: Tensor, old: Tensor, alpha: float, mode: str) -> Tensor:
    """OPCM's P_alpha(new; old): what of `new` avoids the leading singular directions of `old`."""
    if not old.any():
        return new
    u, sigma, vh = torch.linalg.svd(old, full_matrices=True)
    rank = int((sigma > max(old.shape) * torch.finfo(old.dtype).eps * sigma[0]).sum())
    share = sigma.cumsum(0) / sigma.sum()
    split = int((share <= alpha).sum()) if mode == "block" else int((share < alpha).sum()) + 1
    split = rank if alpha >= 1 else min(split, rank)

    coefficients = u.T @ new @ vh.T
    coefficients[range(rank), range(rank)] = 0  # directions of no weight in `old` have no diagonal of their own
    if mode == "block":
        coefficients[:split, :split] = 0
    else:
        coefficients[:split] = 0
        coefficients[:, :split] = 0
    return u @ coefficients @ vh


def opcm(
    models: Sequence[Mapping[str, Tensor]],
    projected: Collection[str],
    alpha: float = 0.5,
    mode: Literal["block", "two_sided"] = "block",
) -> dict[str, Tensor]:
    """OPCM (2501.09522), the loop: `block` as in the released code, `two_sided` as in the paper."""
    merged, mean = dict(models[0]), flatten(models[:1]).norm()
    factor = torch.ones_like(mean)
    for t, model in enumerate(models[1:], start=2):
        fresh = {key: _projection(x, merged[key], alpha, mode) if key in projected else x for key, x in model.items()}
        mean = ((t - 1) * mean + flatten([model]).norm()) / t
        total = {key: factor * merged[key] + fresh[key] for key in merged}
        length = flatten([total]).norm()
        factor = length / mean if length > 0 else torch.ones_like(length)
        merged = {key: x / factor for key, x in total.items()}
    return merged
