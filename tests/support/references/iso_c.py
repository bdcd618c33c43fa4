"""Iso-C by its paper."""

from __future__ import annotations

from torch import Tensor

from support.references.spectral import decomposed, mean_of

__all__ = ["iso_c"]


def iso_c(tau: Tensor, scale: float = 1.5) -> Tensor:
    """Iso-C (2502.04959): the sum with all its singular values replaced by their mean, in its own range."""
    u, s, vh = decomposed(tau.sum(0))
    return scale * mean_of(s) * (u @ vh)
