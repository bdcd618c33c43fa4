"""Base class of wrappers that drop entries at random and rescale the kept entries."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from pydantic import Field

from merging.maths.coefficients import column
from merging.maths.delta import Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.maths.sums import safe_ratio, spans
from merging.methods.contract.method import Statistic, Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper

__all__ = ["Dropping"]

_NORMS = "dropping.norms"


class Dropping(Wrapper):
    """A wrapper that drops entries of each change at random, and rescales the kept entries.

    The dropped entries follow from the seed, the content of the model, the name of the tensor and the position in it.
    """

    rescale: Literal["inverse", "l1", "none"] = Field(
        "inverse", description="how the kept entries make up for the rest"
    )
    seed: int = Field(0, description="another seed drops other entries")

    @property
    def factored(self) -> bool:
        return False

    @abstractmethod
    def thin(self, stack: Stack, site: Site, divide: bool) -> Tensor:
        """Return the changes ``[n, *shape]`` with dropped entries 0; ``divide`` the kept ones by their probability."""

    def required_statistics(self) -> tuple[Statistic, ...]:
        own = (Statistic(_NORMS, Sum(), self._norms, per="tensor"),) if self.rescale == "l1" else ()
        return own + super().required_statistics()

    def _norms(self, stack: Stack, site: Site, statistics: Statistics) -> Tensor:
        """Return parts of the L1 norms of each change before and after dropping, ``[2 n, parts]``."""
        both = [spans(each.abs()) for each in (stack.dense(), self.thin(stack, site, divide=False))]
        return torch.cat([torch.cat([whole.sum(-1), rest.sum(-1, keepdim=True)], 1) for whole, rest in both])

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        values = self.thin(stack, site, divide=self.rescale == "inverse")
        if self.rescale == "l1":
            before, after = statistics[_NORMS].view(2, -1).tolist()
            values *= column([safe_ratio(b, a) for b, a in zip(before, after, strict=True)], values)
        return Unwrapped(self.then, Stack.of(values, stack.models, stack.present), site, lambda merged: merged)
