"""ACE-Merging: regression means by a ridge, with changes in place of inputs, and a rule for changes of unequal size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.fast_svd import leading_triples
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Local
from merging.methods.families.spectral import Spectral
from merging.methods.iso_c import total
from merging.methods.wudi import interference, minimum

__all__ = ["Ace"]


class Ace(Spectral):
    """scale * (sum_i tau_i (G_i + e I)) (sum_i (G_i + e I))^-1 for each matrix, with G_i = tau_i^T tau_i.

    As in `actmat`, the Gram matrix of a change stands for the Gram matrix of its layer's inputs. With the ridge e =
    `epsilon` * mean_i |tau_i|^2, directions that hardly any change has take the plain mean: a large `epsilon` gives the
    mean of the changes, and 0 gives `actmat`. Where the sizes differ, that is, where the variance of log |tau_i|^2 over
    the models is above `threshold`, two things change. Each G_i is divided by |tau_i|^2, and e is `epsilon`, so that
    all models count alike, as in `wudi`. And the leading directions are strengthened: of R = U S V^T = sum_i tau_i (G_i
    - mean_j (G_j + e I)) + the merged matrix, the share `refine` of the directions is added, each times the mean of
    their values. Models that do not change a tensor do not count. Vectors, convolutions and embedding tables take scale
    times the mean. Adapters need a scale near 0.4, as at 1 the result is nearly as large as the sum of the changes.

    Departures from the released code (unravel-xu/ACE-Merging). Its ridge and its gate depend on the unit of the
    weights: the ridge is 0.01 itself, or 0.01 / |tau_i|^2 where sizes differ, by which the smallest change comes to
    rule. The gate divides the variance by the squared mean of log |tau_i|^2, which explodes where norms are near 1.
    Here both are free of the unit. The code also subtracts from each change its mean over the outputs, and loses it.
    And it adds 1 c^T to the sum of Gram matrices, with the means c of its columns. Both terms depend on the basis, and
    are left out. But for them the matrices are the same at the same ridges and gate.

    On adapters it is exact, in the joint spaces of the factors. On full checkpoints it takes one eigenvalue problem of
    a matrix's inputs, and an SVD more where sizes differ, with one matrix in memory at a time.
    """

    name: ClassVar[str] = "ace"
    summary: ClassVar[str] = "regression means without data, by a ridge, for unequal sizes"
    paper: ClassVar[str] = "ACE-Merging, Xu et al. 2026, arXiv 2603.02945"
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "longer"
    workspace: ClassVar[int] = 6

    epsilon: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(
        0.01, description="ridge, as a share of the changes' mean squared norm"
    )
    threshold: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(
        0.3, description="variance of log |tau|^2 above which all models count alike"
    )
    refine: Local[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.3, description="share of the directions that is strengthened where sizes differ"
    )

    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        changed = [change for change in (each.double() for each in changes) if float(change.square().sum())]
        if not changed:
            return torch.zeros_like(changes[0]).double()
        sizes = torch.stack([change.square().sum() for change in changed])
        unequal = len(changed) > 1 and float(sizes.log().var()) > self.threshold
        weights, target = interference(changed, equal=unequal)
        summed, ridge = total(changed), self.epsilon * (1.0 if unequal else float(sizes.mean()))
        weights.diagonal().add_(len(changed) * ridge)
        residual = target - summed @ weights / len(changed) if unequal else None
        merged = minimum(weights, target + ridge * summed)
        return merged if residual is None else merged + self._strengthen(residual + merged)

    def _strengthen(self, matrix: Tensor) -> Tensor:
        """Return the leading directions of a matrix, with the mean of their singular values."""
        u, values, vh = leading_triples(matrix, svd="exact")
        if not self.refine or not len(values):
            return torch.zeros_like(matrix)
        kept = max(1, int(self.refine * len(values)))
        return values[:kept].mean() * u[:, :kept] @ vh[:kept]
