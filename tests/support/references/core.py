"""Core Space by its paper."""

from __future__ import annotations

from torch import Tensor

from support.references.spectral import joint_basis, rounded

__all__ = ["core"]


def core(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Core Space (2509.17786): the joint bases `U [out, k]` and `V [in, l]`, and the models in them, `[n, k, l]`."""
    u, v = joint_basis(tau), joint_basis(tau.mT)
    return u, v, rounded(u.T @ tau @ v)
