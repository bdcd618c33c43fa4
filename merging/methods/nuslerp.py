"""NuSLERP: spherical interpolation by weights, of whole tensors, rows or columns, of weights or of changes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from merging.errors import OptionError
from merging.maths.coefficients import number
from merging.maths.delta import Delta, Dense, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Statistic, Statistics
from merging.methods.families.spherical import OnSphere, arc_weights, gram, plain_weights

__all__ = ["NuSlerp"]

_COLLINEAR = 1 - 1e-12
"""Beyond this cosine the arc's formula has lost all its digits, in float64."""


_GRAINS: dict[str, Grain] = {"flat": "element", "rows": "row", "columns": "matrix"}


class NuSlerp(OnSphere):
    """Move each tensor a step t = w_2 / (w_1 + w_2) along the arc from the first model's to the second's.

    The formula is the formula of `slerp`, with the arc for nearly collinear tensors too. It applies to each tensor as a
    whole (`axis = flat`), or to each row or column of a matrix. A vector is one row; `rows` are rows in memory, the
    outputs of most linear layers. The tensors are the weights, or with `space = changes` the changes from a base, whose
    angles are wide, so that the arc differs from the chord. On adapters changes are merged exactly, without a base,
    unless by row or column. Costs two passes over each tensor.
    """

    name: ClassVar[str] = "nuslerp"
    summary: ClassVar[str] = "spherical interpolation by weights, whole or by row"
    paper: ClassVar[str] = "NuSLERP, Goddard 2024, in mergekit"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    axis: Literal["flat", "rows", "columns"] = Field("flat", description="what the angle is taken of")

    def check(self, models: int) -> None:
        super().check(models)
        if not self.varies and models == 2 and sum(map(number, self.coefficients(2))) == 0:
            raise OptionError("the weights of nuslerp sum to zero, so there is no step between the models: change them")

    def grain_at(self, site: Site) -> Grain:
        return _GRAINS[self.axis]

    @property
    def factored(self) -> bool:
        return super().factored and self.axis == "flat"

    def required_statistics(self) -> tuple[Statistic, ...]:
        return super().required_statistics() if self.axis == "flat" else ()

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        first, second = self.coefficients(2)
        step = second / (first + second)
        if self.axis == "flat":
            return stack.weighted_sum(plain_weights(torch.stack(arc_weights(gram(statistics), step, _COLLINEAR))))
        values = stack.dense()
        rows = values.reshape(2, -1, site.row)
        along = -2 if self.axis == "columns" and site.kind != "vector" else -1
        if along == -2 and site.kind == "experts":
            rows = values
        weights = arc_weights(_grams(rows, along), step, _COLLINEAR)
        merged = sum(row * weight.unsqueeze(along).to(row) for row, weight in zip(rows, weights, strict=True))
        assert isinstance(merged, Tensor)
        return Dense(merged.reshape(values.shape[1:]))


def _grams(rows: Tensor, along: int) -> Tensor:
    """Return the inner products ``[2, 2, ...]`` float64 of two models' rows, or columns."""
    products = [[(one * other).sum(along, dtype=torch.float64) for other in rows] for one in rows]
    return torch.stack([torch.stack(each) for each in products])
