"""Base class of wrappers that drop entries at random and rescale the kept entries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from merging.maths.bits import pack_bits, unpack_bits
from merging.maths.coefficients import column
from merging.maths.delta import Stack
from merging.maths.lazy_torch import Tensor
from merging.maths.site import Site
from merging.methods.contract.method import Statistic, Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper
from merging.methods.families.l1_norms import l1_ratios, l1_statistic

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

    def kept_mask(self, stack: Stack, model: int, draw: Callable[[], Tensor]) -> Tensor:
        """Return the mask of the kept entries of a model, of 0 and 1 in the type of the changes.

        It is drawn by ``draw`` once for all times that the engine goes through the same block.
        """
        values = stack.dense()[model]
        key = (self.name, id(self), model)
        if stack.memo is not None and key in stack.memo:
            return unpack_bits(stack.memo[key], tuple(values.shape), values.dtype)
        mask = draw()
        if stack.memo is not None:
            stack.memo[key] = pack_bits(mask)
        return mask

    def required_statistics(self) -> tuple[Statistic, ...]:
        own = l1_statistic(_NORMS, lambda stack, site, statistics: self.thin(stack, site, divide=False))
        return (*((own,) if self.rescale == "l1" else ()), *super().required_statistics())

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        values = self.thin(stack, site, divide=self.rescale == "inverse")
        if self.rescale == "l1":
            values *= column(l1_ratios(statistics, _NORMS), values)
        thinned = Stack.of(values, stack.models, stack.present)
        thinned.memo = stack.memo
        return Unwrapped(self.then, thinned, site, lambda merged: merged)
