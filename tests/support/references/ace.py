"""ACE-Merging by its formula."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import decomposed

__all__ = ["ace"]


def ace(tau: Tensor, scale: float = 1.0, epsilon: float = 0.01, threshold: float = 0.3, refine: float = 0.3) -> Tensor:
    """ACE-Merging (2603.02945), without the terms of its code that depend on the basis."""
    nothing = torch.zeros_like(tau[0])
    tau = tau[[bool(each.any()) for each in tau]]
    if not len(tau):
        return nothing
    sizes = tau.square().sum((1, 2))
    unequal = len(tau) > 1 and bool(sizes.log().var() > threshold)
    own = sizes if unequal else torch.ones_like(sizes)
    eye = torch.eye(tau.shape[2], dtype=tau.dtype)
    plain = torch.stack([each.T @ each / size for each, size in zip(tau, own, strict=True)])
    ridged = torch.stack([g + epsilon * (1 if unequal else sizes.mean()) * eye for g in plain])
    out = (tau @ ridged).sum(0) @ torch.linalg.inv(ridged.sum(0))
    if unequal:
        u, s, vh = decomposed((tau @ (plain - ridged.mean(0))).sum(0) + out)
        kept = max(1, int(refine * int((s > 1e-6 * s[0]).sum())))
        out = out + s[:kept].mean() * u[:, :kept] @ vh[:kept]
    return scale * out
