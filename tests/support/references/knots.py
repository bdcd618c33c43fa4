"""KnOTS by its paper."""

from __future__ import annotations

from torch import Tensor

from support.references.spectral import joint_basis, rounded

__all__ = ["knots"]


def knots(tau: Tensor) -> tuple[Tensor, Tensor]:
    """KnOTS (2410.19735): the joint basis `U [out, k]`, and the models in it, `[n, k, in]`; model i is `U p_i`."""
    u = joint_basis(tau)
    return u, rounded(u.T @ tau)  # S V_i^T, without the rounding errors that S and V have where nothing changes
