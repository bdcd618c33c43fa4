"""WUDI by its paper: the loss, and its minimum."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import CUT

__all__ = ["wudi", "wudi_loss"]


def wudi_loss(merged: Tensor, tau: Tensor) -> float:
    """What WUDI (2503.08099) minimises: the interference with the models' own rows, each in proportion to its size."""
    loss = [((merged - each) @ each.T).square().sum() / each.square().sum() for each in tau if each.any()]
    return float(sum(loss))


def wudi(tau: Tensor, scale: float = 1.0) -> Tensor:
    """The least-norm minimiser of the WUDI loss (2503.08099)."""
    grams = torch.stack([each.T @ each / each.square().sum() if each.any() else each.T @ each for each in tau])
    values, vectors = torch.linalg.eigh(grams.sum(0))
    kept = values > CUT * values[-1:]
    inverse = vectors[:, kept] @ torch.diag(1 / values[kept]) @ vectors[:, kept].T
    return scale * (tau @ grams).sum(0) @ inverse
