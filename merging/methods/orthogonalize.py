"""Orthogonalize: move the factors of different adapters towards orthogonality, before any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.delta import LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import balance
from merging.maths.parameters import Local
from merging.maths.site import Site
from merging.methods.contract.method import Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper

__all__ = ["Orthogonalize", "orthogonalize_factors", "overlap"]

_TURNED = "orthogonalize: share of tensors turned"
_OVERLAP = {
    (side, when): f"orthogonalize: overlap of {side} factors {when}"
    for side in ("down", "up")
    for when in ("before", "after")
}

_SMALLEST_STEP = 1e-12

_NOISE = 1e-15
"""A gain below this share of the cost is lost in rounding, and ends the descent."""


class Orthogonalize(Wrapper):
    """Nudge the row spaces, and the column spaces, of the adapters' changes towards mutual orthogonality.

    For the down factors A_i (and so for the up factors, transposed), each normalized to unit Frobenius norm,

        sum_{i != j} |(A_i + d_i) (A_j + d_j)^T|_F^2 + gamma sum_i |d_i|_F^2

    is minimized over d by `steps` steps of gradient descent from 0. A step is halved until it pays, and the next one is
    doubled; at the end the norms are restored. Every iterate is A = C A_0, so the computation is on matrices of the sum
    of ranks. The paper leaves the form of the overlap open; this one does not depend on a rotation of a factor's rows.
    The factors are balanced first (their product's singular values split evenly), so that the result depends on the
    changes alone, not on how they were factored. The overlaps before and after are reported.

    It is one half of DO-Merging, for use with any other method: `orthogonalize+task_arithmetic`. It acts on low-rank
    adapters. Changes in full have no factors and pass unchanged; the share of tensors that were turned is reported.
    """

    name: ClassVar[str] = "orthogonalize"
    summary: ClassVar[str] = "turn adapters' factors away from each other"
    paper: ClassVar[str] = "DO-Merging, Zheng et al. 2025, arXiv 2505.15875"
    needs_whole: ClassVar[bool] = True
    metric_meanings: ClassVar[Mapping[str, str]] = {
        _TURNED: "1 if all adapters have low-rank factors, which alone can be turned",
        **dict.fromkeys(_OVERLAP.values(), "mean squared overlap of two adapters' factors; 0 is orthogonal"),
    }

    steps: Local[Annotated[int, Field(ge=0, le=10_000)]] = Field(
        100, description="steps of gradient descent; 0 leaves the factors as they are"
    )
    gamma: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(
        1.0, description="penalty for moving a factor; 0 is none"
    )

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        deltas = [delta for delta in stack.deltas if isinstance(delta, LowRank)]
        if not self.steps or not stack.low_rank or deltas[0].up.dim() > 2 or len(deltas) < 2:
            return Unwrapped(self.then, stack, site, lambda merged: merged, {_TURNED: 0.0})
        balanced = [balance(delta) for delta in deltas]
        metrics = {_TURNED: 1.0}
        sides = []
        for side, factors in (
            ("down", [delta.down for delta in balanced]),
            ("up", [delta.up.mT for delta in balanced]),
        ):
            turned = orthogonalize_factors(factors, self.steps, self.gamma)
            metrics[_OVERLAP[side, "before"]] = overlap(factors)
            metrics[_OVERLAP[side, "after"]] = overlap(turned)
            sides.append(turned)
        moved = [
            LowRank(up.mT.to(delta.up.dtype), down.to(delta.down.dtype), delta.shape, delta.transposed)
            for delta, down, up in zip(deltas, *sides, strict=True)
        ]
        moved_stack = Stack(moved, stack.models, stack.present)
        return Unwrapped(self.then, moved_stack, site, lambda merged: merged, metrics)


def overlap(factors: Sequence[Tensor]) -> float:
    """Return the mean of ``|A_i A_j^T|_F^2`` over pairs of factors ``[r_i, k]`` at unit norm."""
    factors = [factor for factor in factors if factor.any()]  # an adapter without the module overlaps with none
    pairs = len(factors) * (len(factors) - 1)
    if not pairs:
        return 0.0
    stacked, _, masks = _normalize(factors)
    return float((stacked @ stacked.mT * masks).square().sum()) / pairs


def orthogonalize_factors(factors: Sequence[Tensor], steps: int, gamma: float) -> list[Tensor]:
    """Return factors ``[r_i, k]`` after gradient descent on their overlap, float64, with their norms as before."""
    start, norms, between = _normalize(factors)
    gram = start @ start.mT
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    coordinates, products, step = identity, gram, 1.0

    def cost(products: Tensor, moved: Tensor) -> float:
        return float((products * between).square().sum() + gamma * (moved @ gram * moved).sum())

    value = cost(products, coordinates - identity)
    for _ in range(steps):
        slope = 4 * (products * between) @ coordinates + 2 * gamma * (coordinates - identity)
        with_gram = slope @ gram
        steepness = float((with_gram * slope).sum())
        if steepness * step <= _NOISE * value:
            break
        cross, square = with_gram @ coordinates.mT, with_gram @ slope.mT
        while step >= _SMALLEST_STEP:
            trial = products - step * (cross + cross.mT) + step**2 * square
            reached = cost(trial, coordinates - step * slope - identity)
            if reached <= value - step / 2 * steepness:
                break
            step /= 2
        else:
            break
        coordinates, products, value = coordinates - step * slope, trial, reached
        step *= 2
    moved = (coordinates @ start) * norms
    return list(torch.split(moved, [len(factor) for factor in factors]))


def _normalize(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors stacked at unit norm ``[R, k]``, the norms ``[R, 1]``, and 1 between different factors."""
    doubles = [factor.double() for factor in factors]
    norms = torch.cat([each.norm().expand(len(each), 1) for each in doubles])
    owner = torch.cat([torch.full((len(each),), i, device=each.device) for i, each in enumerate(doubles)])
    stacked = torch.cat(doubles) / torch.where(norms > 0, norms, 1.0)
    return stacked, norms, (owner[:, None] != owner).to(stacked)
