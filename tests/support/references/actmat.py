"""ACTMat by its released code."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["actmat"]


def actmat(tau: Tensor, scale: float = 1.0) -> Tensor:
    """ACTMat (2604.01329): a regression mean in which each change stands for its inputs."""
    weighted = sum(each @ each.T @ each for each in tau)
    grams = torch.stack([each.T @ each for each in tau]).sum(0)
    result: Tensor = scale * weighted @ torch.linalg.pinv(grams, rtol=1e-6, hermitian=True)
    return result
