"""DOP: models are merged one after the other, each step a compromise between the merge so far and the next model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.coefficients import number
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import CUT
from merging.maths.parameters import Coefficient, Local
from merging.methods.contract.update_rule import UpdateRule
from merging.methods.families.spectral import Spectral

__all__ = ["Dop", "compromise"]


class Dop(Spectral):
    """Dual orthogonal projection, in the order of the models: S_1 = tau_1, and S_t is the S that minimizes

    alpha L(S, S_{t-1}) + (1 - alpha) L(S, tau_t) with L(S, X) = |X^T (S - X)|^2 + |(S - X) X^T|^2.

    So S differs from both models only where they do not act: X^T and X stand for the inputs and outputs of a layer with
    the change X, each direction weighted by its singular value. It keeps what was merged (stability) against the next
    model (plasticity). The loss is quadratic and S solves a Sylvester equation, A S + S B = C. Directions with less
    than 1e-6 of the largest weight take the weighted mean. The result is times `scale`; vectors, convolutions and
    embedding tables take scale times the mean of all models.

    Departures from the released code (fusion_bench): it takes 200 steps of Adam from the mean of both, at a rate of
    1e-4 for entries of some 1e-3, and lets a multiple-gradient solver move alpha slowly. Here S is the minimum for
    alpha itself. It averages other tensors pair by pair, so that the last model has half of the weight there. It drops
    the smallest singular directions of each model.

    It is meant for models that arrive one by one, and can grow in a store, where its state is as large as one model.
    On adapters it is exact, in the joint spaces of the factors. On full checkpoints it takes an eigenvalue problem of
    each side of a matrix for each further model, with one matrix in memory at a time.
    """

    name: ClassVar[str] = "dop"
    summary: ClassVar[str] = "one after the other, least change where each one acts"
    paper: ClassVar[str] = "Continual Model Merging without Data, Yang et al. 2025, NeurIPS 2025"
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "longer"
    workspace: ClassVar[int] = 6

    alpha: Local[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.8, description="weight of the merge so far against the next model's"
    )

    def decompositions(self, models: int) -> int:
        return 2 * max(1, models - 1)

    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        merged = changes[0].double()
        for change in changes[1:]:
            merged = compromise(merged, change.double(), self.alpha)
        return merged

    def update_rule(self) -> UpdateRule:
        """Merge matrices step by step, and add up all other tensors, whose mean is taken in the end."""
        fields = {"alpha": self.alpha, "embeddings": self.embeddings}
        return UpdateRule(
            {"merged": _DopState(**fields)},
            lambda history: number(self.scale),
            lambda history: _DopState(**fields, scale=self.scale, share=1 / max(1, history.models)),
        )


class _DopState(Dop):
    """DOP on a state that holds the sum of tensors which are averaged, and not their mean."""

    share: float = 1.0

    def others(self, models: int) -> list[Coefficient]:
        return [self.share] * models


def compromise(held: Tensor, change: Tensor, alpha: float) -> Tensor:
    """Return the S ``[out, in]`` of least alpha L(S, held) + (1 - alpha) L(S, change), all float64."""
    if not held.numel():
        return held
    pairs = ((alpha, held), (1 - alpha, change))
    out_values, out_vectors = torch.linalg.eigh(sum(weight * each @ each.mT for weight, each in pairs))
    in_values, in_vectors = torch.linalg.eigh(sum(weight * each.mT @ each for weight, each in pairs))
    target = sum(2 * weight * each @ (each.mT @ each) for weight, each in pairs)
    mean = sum(weight * each for weight, each in pairs)
    target, mean = (out_vectors.mT @ each @ in_vectors for each in (target, mean))
    weights = out_values[:, None] + in_values
    known = weights > CUT * weights.max().clamp(min=0)
    solved = torch.where(known, target / torch.where(known, weights, 1.0), mean)
    merged: Tensor = out_vectors @ solved @ in_vectors.mT
    return merged
