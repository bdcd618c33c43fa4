"""ESM: the directions in which the models shift the outputs of layers, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.layer_statistics import InputGram
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import leading_svd
from merging.maths.parameters import Local
from merging.maths.site import Site
from merging.methods.contract.method import Statistics
from merging.methods.families.from_examples import FromInputs
from merging.methods.families.spectral import as_stored, matrices

__all__ = ["Esm"]

_SMALLEST = 1e-10
"""The share of the largest eigenvalue up to which others are rounding."""

Exponent = Annotated[float, Field(ge=0, le=10)]


class Esm(FromInputs):
    """scale * P A for each matrix [m, k]: essential subspace merging, by the inputs of a few examples.

    1. Of each of n models' changes tau_i take P_i, the min(m, k) / n leading eigenvectors (one at least) of
       tau_i G_i tau_i^T, with G_i the Gram matrix of the layer's inputs: the directions in which the outputs on the
       model's own examples shift most. `merge stats` makes a file with G_i for each model (`--stats`). The rows
       A_i = w_i P_i^T tau_i make these shifts.
    2. The columns of P_i and the rows of A_i are multiplied by the eigenvalue of their direction to the `power`,
       divided by the mean of these over the model.
    3. With an exponent `polarize` p, A_i is multiplied by (w_i |tau_i| / mean)^p, which favours models that changed
       much. Then each column of all A_i is multiplied by (|column| / mean)^p, which favours inputs that matter.
    4. P and A, of all models side by side, are replaced by their polar factors times their mean singular value.

    All singular values of A become equal: a single model is not returned as it is. All other tensors, and matrices
    without statistics, take scale times the mean.

    Departures from the released code (kiddo127/ESM): by default it polarizes by an exponent of 2 for images, and its
    step over models and columns is left out for texts, as it is here. Its third step, by the layer's own size, is left
    out. It takes m / n directions, and TSV of matrices without statistics. Directions whose eigenvalue is below 1e-10
    of the largest are rounding, and are left out; models with a weight of 0 too. Its function for one matrix gives the
    same on random changes (within 6e-15).

    On adapters it is exact, and the rank is at most the sum of the ranks. On full checkpoints it takes n eigenvalue
    problems of a matrix's outputs and two of its shorter side, with one matrix in memory at a time.
    """

    name: ClassVar[str] = "esm"
    summary: ClassVar[str] = "directions of the largest output shifts, made orthogonal"
    paper: ClassVar[str] = "Model Merging in the Essential Subspace, Li et al. 2026, arXiv 2602.20208"
    workspace: ClassVar[int] = 8

    power: Local[Exponent] = Field(0.15, description="exponent of a direction's eigenvalue, its weight (0 to 0.3)")
    polarize: Local[Exponent] = Field(
        0.0, description="exponent that favours large models and columns; the paper's is 2"
    )

    def decompositions(self, models: int) -> int:
        return models + 2

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        grams = self.grams(stack, site)
        if grams is None:
            return self.mean(stack)
        weights = self.coefficients(len(stack))
        most = max(1, min(site.shape) // sum(weight > 0 for weight in weights))
        low = [delta for delta in stack.deltas if isinstance(delta, LowRank)] if stack.low_rank else []
        changes: list[tuple[Tensor | None, Tensor]] = [(delta.up, delta.down) for delta in low]
        if not low:
            changes = [(None, each) for each in matrices(stack.dense(), site)]
        shifts = [
            _shift(up, down.double() * weight, gram, most)
            for (up, down), gram, weight in zip(changes, grams, weights, strict=True)
            if weight > 0
        ]
        left, right = self._join(shifts)
        left, right = _whiten(left).to(stack.dtype), _whiten(right).to(stack.dtype)
        if low:
            return LowRank(left, right, low[0].shape, low[0].transposed).scaled(self.scale)
        return Dense(as_stored(left @ right, site)).scaled(self.scale)

    def _join(self, shifts: Sequence[_Shift]) -> tuple[Tensor, Tensor]:
        """Return the directions ``[out, k]`` and the rows ``[k, in]`` of all models, weighted by their importance."""
        lefts, rights = [], []
        mean_size = sum(shift.size for shift in shifts) / len(shifts)
        for shift in shifts:
            importance = shift.values**self.power
            importance = importance / importance.mean() if len(importance) else importance
            lefts.append(shift.directions * importance)
            factor = (shift.size / mean_size) ** self.polarize if mean_size else 1.0
            rights.append(shift.rows * importance[:, None] * factor)
        right = torch.cat(rights)
        if self.polarize and len(right):
            sizes = torch.linalg.vector_norm(right, dim=0)
            right = right * (sizes / sizes.mean()) ** self.polarize
        return torch.cat(lefts, 1), right


@dataclass(frozen=True, slots=True, eq=False)
class _Shift:
    """The leading directions of a layer's output shift, float64.

    ``directions`` is ``[out, k]``, ``values`` ``[k]`` their eigenvalues, and ``rows`` ``[k, in]`` the change along
    each. ``size`` is the Frobenius norm of the whole change.
    """

    directions: Tensor
    values: Tensor
    rows: Tensor
    size: float


def _shift(up: Tensor | None, rows: Tensor, gram: InputGram, most: int) -> _Shift:
    """Return the leading directions of a change ``up @ rows``, or of ``rows`` themselves without ``up``."""
    basis = None
    if up is not None:
        basis, inner = torch.linalg.qr(up.double())
        rows = inner @ rows
    values, vectors = torch.linalg.eigh(gram.apply(rows) @ rows.mT)
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    count = int((values > _SMALLEST * values[:1].clamp(min=0)).sum())
    values, vectors = values[:count], vectors[:, :count]
    directions = vectors if basis is None else basis @ vectors
    return _Shift(directions, values, vectors.mT @ rows, float(torch.linalg.matrix_norm(rows)))


def _whiten(matrix: Tensor) -> Tensor:
    """Return the polar factor of a matrix times the mean of its singular values."""
    u, values, vh = leading_svd(matrix)
    return u @ vh * (values.sum() / max(1, min(matrix.shape)))
