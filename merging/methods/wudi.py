"""WUDI: the merged matrix with the least interference on the inputs that each model's change acts on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import CUT
from merging.maths.parameters import Local
from merging.maths.site import Site
from merging.methods.families.spectral import Spectral
from merging.methods.iso_c import total

__all__ = ["Wudi", "descend", "interference", "minimum"]

_RATE, _EPS = 0.01, 1e-3
"""Adam's rate as a share of the sum's root mean square, and its epsilon as a share of K's, so that rounding errors move
nothing. They are about the published absolute values on task vectors of vision transformers."""


_SMALL = 64
"""Matrices of at most this many inputs are always decomposed."""


class Wudi(Spectral):
    """For each matrix, the tau that minimizes sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2.

    A layer's change is spanned by its inputs, so that this is the interference on them, without any data. It is
    quadratic. `mode = closed` takes its minimum, tau = (sum_i tau_i G_i)(sum_i G_i)^+ with G_i = tau_i^T tau_i /
    |tau_i|^2, where the pseudo-inverse leaves out eigenvalues below 1e-6 of the largest. `adam` is the published
    method: `steps` steps of Adam from the sum of the changes, which end well before the minimum. The published rate of
    1e-5 suits a sum with root mean square 1e-3; here the rate is 0.01 of the root mean square, so that the size of the
    changes does not matter. Vectors, convolutions and embedding tables take the mean. A scale of 1 suits full
    fine-tunes. Adapters need 0.1 to 0.3, as the result of `closed` has there some 3.5 times the norm of the plain sum.

    `closed` is exact on adapters, in the joint spaces of the factors; on full checkpoints it is one eigenvalue problem
    of a matrix's inputs. `adam` depends on the basis, so that adapters are written out and the merged change has full
    rank; a 4096 x 4096 matrix takes minutes on a CPU.
    """

    name: ClassVar[str] = "wudi"
    summary: ClassVar[str] = "least interference on what each model's change acts on"
    paper: ClassVar[str] = "Whoever Started the Interference Should End It, Cheng et al. 2025, arXiv 2503.08099"
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "longer"
    workspace: ClassVar[int] = 5

    mode: Literal["closed", "adam"] = Field("closed", description="the minimum, or steps towards it")
    steps: Local[Annotated[int, Field(ge=1, le=100_000)]] = Field(300, description="steps of Adam")

    @property
    def factored(self) -> bool:
        return self.mode == "closed"

    def idle(self, site: Site) -> Mapping[str, str]:
        return {**super().idle(site), **({"steps": "mode = closed takes no steps"} if self.mode == "closed" else {})}

    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        weights, target = interference([change.double() for change in changes])
        if self.mode == "closed":
            return minimum(weights, target)
        return descend(weights, target, total(changes), self.steps)


def interference(changes: Sequence[Tensor], equal: bool = True) -> tuple[Tensor, Tensor]:
    """Return H = sum_i G_i ``[in, in]`` and K = sum_i tau_i G_i ``[out, in]``: the gradient at tau is 2 (tau H - K).

    G_i = tau_i^T tau_i, divided by |tau_i|^2 if all models count alike (``equal``).
    """
    weights = changes[0].new_zeros(changes[0].shape[1], changes[0].shape[1])
    target = torch.zeros_like(changes[0])
    for change in changes:
        squares = float(change.square().sum())
        if squares:
            own = change.mT @ change / (squares if equal else 1)
            weights += own
            target += change @ own
    return weights, target


def minimum(weights: Tensor, target: Tensor) -> Tensor:
    """Return K H^+; of large matrices by Cholesky factors, in a third of the time, where no eigenvalue is left out."""
    if len(weights) > _SMALL:
        shifted = weights.clone()
        shifted.diagonal().sub_(CUT * torch.linalg.matrix_norm(weights))  # at least the largest eigenvalue
        if not torch.linalg.cholesky_ex(shifted).info:
            solved: Tensor = torch.cholesky_solve(target.mT, torch.linalg.cholesky(weights))
            return solved.mT
    values, vectors = torch.linalg.eigh(weights)
    inverse = torch.where(values > CUT * values[-1:], 1 / torch.where(values > 0, values, 1.0), 0.0)
    found: Tensor = (target @ vectors * inverse) @ vectors.mT
    return found


def descend(weights: Tensor, target: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return the sum after steps of Adam, which are in units of its root mean square."""
    size = float(start.square().mean().sqrt())
    if not isfinite(size):
        raise torch.linalg.LinAlgError("the sum of the changes is not finite")  # type: ignore[attr-defined]
    if not size:
        return start
    target = target / size
    current = (start / size).requires_grad_()
    optimizer = torch.optim.Adam([current], lr=_RATE, eps=_EPS * float(target.square().mean().sqrt()))
    for _ in range(steps):
        current.grad = 2 * (current.detach() @ weights - target)
        optimizer.step()
    return current.detach() * size
