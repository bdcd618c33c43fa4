"""ESM by its paper and released code, from the layers' inputs themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["esm"]


def esm(tau: Tensor, inputs: Sequence[Tensor], power: float = 0.15, polarize: float = 0.0) -> Tensor:
    """Essential subspace merging (2602.20208) of changes `[n, out, in]` and inputs `[tokens, in]` of each model."""
    tau = tau.double()
    most = max(1, min(tau.shape[1:]) // len(tau))
    directions, rows = [], []
    for change, x in zip(tau, inputs, strict=True):
        shift = x.double() @ change.T / len(x) ** 0.5
        _, s, vh = torch.linalg.svd(shift, full_matrices=False)
        kept = int((s[:most] > 1e-5 * s[0]).sum())
        importance = s[:kept] ** (2 * power)
        importance = importance / importance.mean()
        directions.append(vh[:kept].T @ torch.diag(importance))
        rows.append(torch.diag(importance) @ vh[:kept] @ change * change.norm() ** polarize)
    mean = torch.stack([change.norm() for change in tau]).mean()
    below = torch.cat(rows) / mean**polarize
    for column in range(below.shape[1]) if polarize else ():
        sizes = torch.cat(rows).norm(dim=0)
        below[:, column] *= (sizes[column] / sizes.mean()) ** polarize
    return _equal_singular_values(torch.cat(directions, 1)) @ _equal_singular_values(below)


def _equal_singular_values(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept] @ vh[kept] * s.mean()
