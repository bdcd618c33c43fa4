"""Train difference: add what a model learned, where the other model has not learned it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from merging.maths.delta import Delta, Dense, Stack
from merging.maths.lazy_torch import torch
from merging.maths.parameters import Coefficient, Local
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistics

__all__ = ["TrainDifference"]


class TrainDifference(Method):
    """tau_A + 1.8 * scale * m * tau_B with m = |tau_B - tau_A| / (|tau_B - tau_A| + |tau_B|), entry by entry.

    A is the first model, B the second one, and the base is the model that B was trained from. Where A equals B nothing
    is added, and where A is the base 0.9 * scale of B's change. It is `trainDifference` of supermerger (A + (B - C) for
    `--base C A B`) and `train_difference_mask` of sd-mecha, which have the factor 1.8 too. Order matters.

    On adapters the merged change has full rank. Costs one pass over the bytes.
    """

    name: ClassVar[str] = "train_difference"
    summary: ClassVar[str] = "the second model's change, as far as the first lacks it"
    paper: ClassVar[str] = "trainDifference, hako-mikan 2023, in sd-webui-supermerger"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    scale: Local[Coefficient] = Field(1.0, description="what the second model's change is multiplied by, with 1.8")

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        first, second = stack.dense()
        missing = (second - first).abs()
        both = missing + second.abs()
        mask = torch.where(both > 0, missing / torch.where(both > 0, both, 1.0), 0.0)
        return Dense(first + 1.8 * self.scale * mask * second)
