"""LoRA of the experts of a layer, which are stacked in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.changes import LoraChange
from merging.sources.tensor_views import view

__all__ = ["ExpertsChange"]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsChange(LoraChange):
    """The change ``scale * up[e] @ down[e]`` for every expert e: ``down`` is ``[E, r, in]`` and ``up`` ``[E, out, r]``.

    The target is ``[E, out, in]``, or ``[E, in, out]`` if ``transposed``. ``either``: the program that wrote the file
    confused inputs and outputs for some models, so that the base must decide.
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
        """Return the change for a base tensor of this shape, which is ``[E, in, out]`` if ``inputs_first``.

        A shape is stronger evidence than a name: ``inputs_first`` decides only if inputs and outputs have the same
        size.
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
