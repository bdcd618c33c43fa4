"""Decouple: merge the directions of the changes by any method, and their magnitudes by the mean."""

from __future__ import annotations

from typing import ClassVar

from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import balance_terms
from merging.maths.site import Site
from merging.methods.contract.method import Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper

__all__ = ["Decouple", "column_norms"]

_DEAD = 32
"""A column is dead if its norm is below this number of rounding errors of the norm of the whole change."""


class Decouple(Wrapper):
    """Split each input's column of a change into magnitude and direction; the method inside merges the directions.

    tau_i = magnitude_i * direction_i with magnitude_i[j] = |tau_i[:, j]|_2 for each column, that is for each input
    feature (of an embedding, each token). The method inside merges the directions, columns of length 1; the result is
    multiplied by the mean magnitude of the models that have the tensor. So no model outweighs the others by the size of
    its change. A column without change has no direction and stays 0. A bias or a norm is one column.

    It is one half of DO-Merging, for use with any other method, as the paper proposes: `decouple+ties`. A factored
    merge inside stays factored, and no matrix is built. Full tensors are in memory one at a time.
    """

    name: ClassVar[str] = "decouple"
    summary: ClassVar[str] = "merge directions inside, and magnitudes by their mean"
    paper: ClassVar[str] = "DO-Merging, Zheng et al. 2025, arXiv 2505.15875"
    needs_whole: ClassVar[bool] = True

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        norms = torch.stack([column_norms(delta, site) for delta in stack.deltas])
        dead = norms <= _DEAD * torch.finfo(stack.dtype).eps * norms.square().sum(-1, keepdim=True).sqrt()
        inverse = torch.where(dead, 0.0, 1 / torch.where(dead, 1.0, norms))
        directions = [_by_column(delta, each, site) for delta, each in zip(stack.deltas, inverse, strict=True)]
        mean = norms[list(stack.present)].mean(0)
        return Unwrapped(
            self.then,
            Stack(directions, stack.models, stack.present),
            site,
            lambda merged: _by_column(merged, mean, site),
        )


def column_norms(delta: Delta, site: Site) -> Tensor:
    """Return the norm of each input's column, ``[..., in]`` float64; of factors by the triangle of a QR."""
    if isinstance(delta, LowRank):
        triangle = torch.linalg.qr(delta.up.double(), mode="r")[1]
        columns = triangle @ delta.down.double()
    else:
        columns = _matrix(delta.value, site)
    norms: Tensor = torch.linalg.vector_norm(columns, dim=-2, dtype=torch.float64)
    return norms


def _matrix(value: Tensor, site: Site) -> Tensor:
    """Return a tensor as matrices ``[..., out, in]``."""
    if site.kind == "vector":
        return value.reshape(-1, 1)
    if site.kind == "conv":
        return value.flatten(1)
    return value.mT if site.axis == 0 else value


def _by_column(delta: Delta, factors: Tensor, site: Site) -> Delta:
    """Multiply the columns of a change by factors ``[..., in]``."""
    factors = factors[..., None, :]
    if isinstance(delta, LowRank):
        return balance_terms(LowRank(delta.up, delta.down * factors, delta.shape, delta.transposed), delta.up.dtype)
    matrix = _matrix(delta.value, site)
    scaled = matrix * factors.to(matrix.dtype)
    turned = site.axis == 0 and site.kind in ("matrix", "embedding")
    return Dense((scaled.mT if turned else scaled).reshape(delta.shape))
