"""SVD: the sum of the changes without its smallest singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.fast_svd import leading_triples
from merging.maths.lazy_torch import Tensor
from merging.maths.parameters import Coefficient, Local, PerModel
from merging.maths.products import multiply
from merging.methods.families.spectral import Singular
from merging.methods.iso_c import total

__all__ = ["Svd"]


class Svd(Singular):
    """scale * sum_i w_i tau_i, with each matrix cut to its leading singular triples.

    It keeps the fewest triples whose squared singular values add up to the share `energy` of all, and at most
    `max_rank`: the best approximation of the sum at that rank. Small singular values of a sum of task vectors are
    mostly noise. To store the result as an adapter of some rank, `--rank` does the same. All other tensors, and
    embedding tables unless `embeddings`, take the sum. On adapters it is exact, in the joint spaces of the factors. On
    full checkpoints it takes one eigenvalue problem of a matrix's shorter side, with one matrix in memory at a time.
    Large matrices are decomposed in float32 (`svd = fast`), within a thousandth of `exact` on fine-tunes.
    """

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "sum of the changes without its small singular values"
    paper: ClassVar[str] = "The approximation of one matrix by another of lower rank, Eckart and Young 1936"

    energy: Local[Annotated[float, Field(gt=0, le=1)]] = Field(
        0.95, description="share of each matrix's squares that is kept"
    )
    max_rank: Local[Annotated[int, Field(ge=1)]] | None = Field(None, description="most singular values that are kept")
    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; may be negative")

    def others(self, models: int) -> list[Coefficient]:
        return self.coefficients(models)

    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        weighted = [change * weight for change, weight in zip(changes, self.coefficients(len(changes)), strict=True)]
        u, values, vh = leading_triples(total(weighted), self.max_rank, svd=self.svd, dtype=changes[0].dtype)
        squares = values.square().cumsum(0)
        # up to rounding, so that a share of 1 keeps all
        kept = int((squares < self.energy * (1 - 1e-12) * squares[-1:]).sum()) + 1
        return multiply(u[:, :kept] * values[:kept], vh[:kept])
