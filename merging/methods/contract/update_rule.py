"""The contract of methods that can be continued: how a merge takes in one more model, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from merging.maths.delta import Delta, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import inner_product
from merging.maths.parameters import Coefficient
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.methods.contract.method import Method, ResultStatistic, Statistics
from merging.methods.contract.wrapper import Wrapper

__all__ = ["History", "UpdateRule", "UpdateStep"]

_PRODUCTS = "products"


@dataclass(frozen=True, slots=True)
class History:
    """The models that were merged so far, in numbers.

    Attributes:
        norms: the norm of each model's change over the whole model, in their order.
        state_norm: the norm of the first part of the state.
    """

    norms: tuple[float, ...] = ()
    state_norm: float = 0.0

    @property
    def models(self) -> int:
        """The number of models."""
        return len(self.norms)


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """How a merge is continued by one model, and how the state becomes the merge of all models.

    The state consists of one part or several. Each part is a change of the base's tensors, and 0 at the start.

    Attributes:
        parts: for each part its name, and the method that merges (the part, the next model's change) into the next
            value of the part.
        scale: the multiple of the state that is the merge, as far as one number says it.
        result: the method that merges the parts, in their order, into the merge of all models.
    """

    parts: Mapping[str, Method]
    scale: Callable[[History], float]
    result: Callable[[History], Method]


class UpdateStep(Wrapper):
    """One update of one part by the method inside, which is not scaled at the end.

    Reports the inner products of the part before, the next model's change, and the part after.
    """

    name: ClassVar[str] = "step"
    summary: ClassVar[str] = "one update of a merge that is continued"

    def result_statistics(self, models: int) -> tuple[ResultStatistic, ...]:
        return (ResultStatistic(_PRODUCTS, Sum(), _products, grain="matrix"),)

    def factor(self, site: Site, statistics: Statistics, models: int) -> Coefficient:
        return 1.0

    def metrics(self, statistics: Statistics, models: int) -> dict[str, float]:
        names = ("held.held", "held.next", "next.next", "held.merged", "next.merged", "merged.merged")
        return dict(zip(names, statistics[_PRODUCTS].tolist(), strict=True))


def _products(merged: Delta, stack: Stack, site: Site) -> Tensor:
    """The inner products of (held, next, merged) with each other, ``[6, 1]`` float64."""
    held, following = stack.deltas
    pairs = [(held, held), (held, following), (following, following)]
    pairs += [(held, merged), (following, merged), (merged, merged)]
    return torch.stack([_product(one, other) for one, other in pairs])[:, None]


def _product(one: Delta, other: Delta) -> Tensor:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return inner_product(one, other)
    pieces = zip(*(torch.split(each.dense().reshape(-1), 1 << 20) for each in (one, other)), strict=True)
    return torch.stack(
        [(a * b).sum(dtype=torch.float64) for a, b in pieces] or [torch.zeros((), dtype=torch.float64)]
    ).sum()
