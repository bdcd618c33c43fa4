"""The geometric median, by Newton's method."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import decomposed
from support.references.weighting import Weights, weights_of

__all__ = ["geometric_median"]


def geometric_median(x: Tensor, weights: Weights = None, scale: float = 1.0) -> Tensor:
    """The minimum of the weighted sum of distances, by Newton's method in the models' span."""
    w = weights_of(weights, x)
    w = w / w.sum()
    basis = decomposed((x - x[0]).T)[0]
    points = (x - x[0]) @ basis

    def cost(point: Tensor) -> float:
        return float((w * (point - points).norm(dim=1)).sum())

    for each, model in zip(points, x, strict=True):  # the minimum, if the others pull with less than its weight
        apart = each - points
        sizes = apart.norm(dim=1, keepdim=True)
        here = sizes[:, 0] < 1e-7 * x.norm(dim=1).max()
        pull = (w[~here, None] * apart[~here] / sizes[~here]).sum(0).norm()
        if pull < w[here].sum() * (1 - 1e-9):
            return scale * model
    if len(x) == 2:  # of equal weights: all points between them have the least sum
        return scale * w @ x
    point = w @ points
    for _ in range(200):
        apart = point - points
        sizes = apart.norm(dim=1, keepdim=True)
        unit, inverse = apart / sizes, w / sizes[:, 0]
        hessian = inverse.sum() * torch.eye(len(point)).to(unit) - unit.T @ torch.diag(inverse) @ unit
        step = torch.linalg.solve(hessian, w @ unit)
        length = 1.0
        while cost(point - length * step) > cost(point) * (1 + 1e-14) and length > 1e-9:
            length /= 2
        point = point - length * step
        if step.norm() < 1e-14 * points.norm():
            break
    return scale * (x[0] + basis @ point)
