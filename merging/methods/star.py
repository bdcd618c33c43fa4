"""STAR: the leading singular values of each change, rescaled to the sum of all, and then the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.fast_svd import leading_triples
from merging.maths.lazy_torch import Tensor
from merging.maths.parameters import Local
from merging.maths.products import multiply
from merging.methods.families.spectral import ExactSingular

__all__ = ["Star"]


class Star(ExactSingular):
    """scale * mean of the truncated changes of each matrix: spectral truncation and rescaling.

    Of each change only the fewest leading singular directions stay whose values make up the share `eta` of the sum of
    all. The values are then multiplied so that their sum is as before. The published share is 0.4. On adapters that
    share is often one direction of a few. Vectors, convolutions and embedding tables take scale times the mean.

    On adapters it is exact, in the joint spaces of the factors. On full checkpoints it takes one eigenvalue problem a
    model of a matrix's shorter side, with one matrix in memory at a time. `svd = fast` takes these in float32 for large
    matrices, within a thousandth of `exact` on fine-tunes.
    """

    name: ClassVar[str] = "star"
    summary: ClassVar[str] = "mean of the leading directions, at their former size"
    paper: ClassVar[str] = "STAR, Lee et al. 2025, arXiv 2502.10339"
    workspace: ClassVar[int] = 5

    eta: Local[Annotated[float, Field(gt=0, le=1)]] = Field(
        0.4, description="share of the sum of a change's singular values that the kept directions have"
    )

    def decompositions(self, models: int) -> int:
        return models

    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        out = changes[0].new_zeros(changes[0].shape).double()
        for change in changes:
            u, values, vh = leading_triples(change, svd=self.svd)
            reached = values.cumsum(0)
            if not len(values):
                continue
            # a share that is reached but for rounding counts as reached
            rank = int((reached < self.eta * reached[-1] * (1 - 1e-9)).sum()) + 1
            rescaled = values[:rank] * (reached[-1] / reached[rank - 1])
            out += multiply(u[:, :rank] * rescaled, vh[:rank])
        return out / len(changes)
