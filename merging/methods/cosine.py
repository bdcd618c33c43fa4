"""Cosine: take from the second model what points elsewhere, column by column."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, Dense, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Local
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Method, Statistics

__all__ = ["Cosine"]


class Cosine(Method):
    """A + k (B - A) with k = 1 - clip(c - alpha, 0, 1), where c is the cosine of A's and B's weights.

    Columns of two models that point the same way stay as in A; the larger `alpha`, the more of B comes in, and all of B
    from 1 on. With `variant = a` c is the cosine of each column (in memory: along the first axis of a tensor). With `b`
    it is the mean of that cosine and the whole tensor's. They are `add_cosine_a` and `add_cosine_b` of sd-mecha. Order
    matters.

    supermerger's cosineA and cosineB differ: they stretch c to [0, 1] between its smallest and largest values in the
    whole model, without the outer hundredths, and take c of weights normalized by column. Fine-tunes of one base
    have cosines near 1 everywhere, so that here only values of `alpha` near 0 or 1 differ. It merges weights, so
    adapters need the base.
    """

    name: ClassVar[str] = "cosine"
    summary: ClassVar[str] = "columns of the second model that point elsewhere"
    paper: ClassVar[str] = "losslessmix, recoilme 2023; add_cosine_a and add_cosine_b in sd-mecha"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    alpha: Local[Annotated[float, Field(ge=-1, le=2)]] = Field(
        0.0, description="cosine up to which a column is the second model's; 1 takes all of it"
    )
    variant: Literal["a", "b"] = Field("a", description="a: cosines of columns; b: their means with the whole tensor's")

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        return "weights"

    def grain_at(self, site: Site) -> Grain:
        return "matrix"

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        first, second = stack.dense()
        along = -2 if site.kind == "experts" else 0
        if not first.dim():
            first, second = first[None], second[None]
        similar = _cosine(first, second, along)
        if self.variant == "b":
            whole = tuple(range(first.dim()))[1 if site.kind == "experts" else 0 :]
            similar = (similar + _cosine(first, second, whole)) / 2
        share = 1 - (similar - self.alpha).clamp(0, 1)
        return Dense(torch.lerp(first, second, share.to(first.dtype)).reshape(stack.dense().shape[1:]))


def _cosine(one: Tensor, other: Tensor, along: int | tuple[int, ...]) -> Tensor:
    """Return the cosines along axes, which are kept, float64; 0 where one of both is 0."""
    products = [
        (a.double() * b.double()).sum(along, keepdim=True) for a, b in ((one, other), (one, one), (other, other))
    ]
    sizes = (products[1] * products[2]).sqrt()
    return torch.where(sizes > 0, products[0] / torch.where(sizes > 0, sizes, 1.0), 0.0)
