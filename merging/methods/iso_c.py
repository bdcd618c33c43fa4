"""Iso-C: the sum of the changes, with equal singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from merging.maths.fast_svd import fast_polar, leading_triples, suits_float32
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Coefficient, Local
from merging.methods.families.spectral import Singular

__all__ = ["IsoC", "total"]

_CACHED = 1 << 17
"""Elements of a sum that are added up at a time."""


class IsoC(Singular):
    """scale * mean(S) * U V^T for each matrix, with sum_i tau_i = U S V^T: isotropic merging in the common space.

    Directions that a few models share dominate a sum; with equal singular values every direction counts. The mean is
    over the singular values above 1e-6 of the largest, and only their directions are kept. (The paper fills up to the
    full rank, which on adapters would put nine tenths of the energy into directions that no model has. So does the
    rounding of adapters that were merged into bfloat16 checkpoints: merge the adapters themselves.) It needs a scale of
    its own (1.5 for eight tasks; search 0.5 to 3). Vectors, convolutions and embedding tables take scale times the
    mean.

    On adapters it is exact, in the joint spaces of the factors, and takes hundredths of a second for each module. On
    full checkpoints it takes one eigenvalue problem of a matrix's shorter side, with one matrix in memory at a time.
    Of large matrices `svd = fast` takes the polar factor and the trace, without singular vectors, in float32, within a
    thousandth of `exact` on fine-tunes.
    """

    name: ClassVar[str] = "iso_c"
    summary: ClassVar[str] = "sum of the changes with equal singular values"
    paper: ClassVar[str] = "No Task Left Behind, Marczak et al. 2025, arXiv 2502.04959"

    scale: Local[Coefficient] = Field(1.5, description="what the merged change is multiplied by (0.5 to 3)")

    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        summed = total(changes)
        if self.svd == "fast" and suits_float32(summed, changes[0].dtype):
            factor = fast_polar(summed.float())
            if factor is not None:  # of the sum of all singular values only the mean is needed
                return factor * (torch.sum(factor * summed) / min(summed.shape))
        u, values, vh = leading_triples(summed, svd="exact")
        return values.sum() / max(1, len(values)) * u @ vh


def total(changes: Sequence[Tensor]) -> Tensor:
    """Return the sum, float64, by blocks of rows that stay in the processor's cache."""
    out = torch.empty_like(changes[0], dtype=torch.float64)
    rows = max(1, _CACHED // max(1, out.shape[1]))
    for block, *parts in zip(*(torch.split(each, rows) for each in (out, *changes)), strict=True):
        block.zero_()
        for part in parts:
            block += part
    return out
