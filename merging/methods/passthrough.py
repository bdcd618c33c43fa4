"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from merging.maths.coefficients import number
from merging.maths.delta import Delta, Stack
from merging.maths.parameters import Coefficient, Local, varies
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistics

__all__ = ["Passthrough"]


class Passthrough(Method):
    """theta = scale * theta_1.

    It scales the weights of a full checkpoint, or the change of an adapter, exactly. With a scale of 1 the model stays
    the same: to convert its type (`--dtype`), its shards, or an adapter to a model (`--as model`), or to scale a few
    tensors by name. Costs one pass over the bytes.
    """

    name: ClassVar[str] = "passthrough"
    summary: ClassVar[str] = "one model as it is, or scaled"
    paper: ClassVar[str] = ""
    models: ClassVar[tuple[int, int | None]] = (1, 1)

    scale: Local[Coefficient] = Field(1.0, description="what the weights, or an adapter's change, are multiplied by")

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        return "weights"

    @property
    def factored(self) -> bool:
        return True

    def multiple(self, models: int) -> float | None:
        return None if varies(self.scale) else number(self.scale)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        return stack.weighted_sum([self.scale])
