"""Clamp: keep every entry of a merge within the range of the models' entries, after any method."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, Dense, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Local
from merging.maths.site import Site
from merging.methods.contract.method import Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper

__all__ = ["Clamp"]


class Clamp(Wrapper):
    """Move each entry of the merge into [min_i tau_i, max_i tau_i], where it is outside.

    So a sum never goes farther than the model that goes farthest: `clamp+task_arithmetic` is a sum without overshoot.
    With `stiffness` the bounds move towards the models' entries next to their mean, on both sides of it; at 1 they are
    these entries. Models that do not change a tensor count as 0. Changes and weights give the same result. It is the
    `clamp` of sd-mecha, with the merged models as bounds.

    A mean is inside its range already. A number by which the method inside scales the whole merge in the end (`lines`,
    `opcm`) comes after the clamp. On adapters the merged change has full rank. It costs nothing.
    """

    name: ClassVar[str] = "clamp"
    summary: ClassVar[str] = "entries of any merge, within the range of the models"
    paper: ClassVar[str] = "clamp, ljleb, in sd-mecha"

    stiffness: Local[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.0, description="0: bounds are the extreme entries; 1: the entries next to their mean"
    )

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        return self.then.merge_space

    @property
    def factored(self) -> bool:
        return False

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        return Unwrapped(self.then, stack, site, lambda merged: self._clamp(merged, stack.dense()))

    def _clamp(self, merged: Delta, values: Tensor) -> Delta:
        least, most = values.amin(0), values.amax(0)
        if self.stiffness:
            mean = values.mean(0)
            above = torch.where(values >= mean, values, most).amin(0)
            below = torch.where(values <= mean, values, least).amax(0)
            least, most = torch.lerp(least, below, self.stiffness), torch.lerp(most, above, self.stiffness)
        return Dense(merged.dense().clamp(least, most))
