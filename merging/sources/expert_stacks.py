"""LoRA of the experts of a layer, which lie side by side in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merging.maths.delta import Delta, LowRank
from merging.sources.adapter import LoraChange
from merging.sources.tensor_views import view

__all__ = ["ExpertsChange"]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsChange(LoraChange):
    """scale * up[e] @ down[e] for every expert e: ``down`` is ``[E, r, in]`` and ``up`` ``[E, out, r]``.

    The target is ``[E, out, in]``, or ``[E, in, out]`` where ``transposed``. ``either``: the program that wrote the
    file took inputs for outputs in some models, and the base must tell.
    """

    either: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        natural = (*self.up.shape[:2], self.down.shape[2])
        return _swap_last_axes(natural) if self.transposed else natural

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape in (self.shape, _swap_last_axes(self.shape))

    def with_orientation(self, shape: tuple[int, ...], inputs_first: bool) -> ExpertsChange:
        """The same, for a base whose tensor has this shape and is known to be ``[E, in, out]``, or not to be.

        A shape says more than a name: only where inputs and outputs are of one size must the latter be believed.
        """
        square = shape[1] == shape[2]
        if not self.either:
            return replace(self, transposed=inputs_first) if square else self
        if self.is_transposed(shape) == inputs_first:
            return replace(self, either=False, needs_base=None)
        up, down = view(self.up).permute(0, 2, 1), view(self.down).permute(0, 2, 1)
        return replace(self, up=down, down=up, transposed=inputs_first, either=False, needs_base=None)

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        up, down = (each.read().to(dtype) for each in (self.up, self.down))
        return LowRank(up * self.scale, down, shape, self.is_transposed(shape))


def _swap_last_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[:0:-1])
