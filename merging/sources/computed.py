"""Changes that are computed from an adapter's tensors when they are read, by a formula of their format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from merging.maths.delta import Delta, Dense, LowRank
from merging.sources.adapter import Change
from merging.sources.stored import Stored

__all__ = ["ComputedChange", "Formula", "WeightView"]


class WeightView:
    """The base's tensor that a formula works for, seen as ``[outputs, inputs, *kernel]`` whichever way it lies.

    ``width`` is what a row of its matrix holds: ``inputs`` times the size of the kernel.
    """

    def __init__(self, shape: tuple[int, ...], base: Callable[[], Tensor] | None = None) -> None:
        self.shape = shape
        self.outputs = shape[0]
        self.width = prod(shape[1:])
        self._base = base

    @cached_property
    def weight(self) -> Tensor:
        """The base's values as a matrix ``[outputs, width]``."""
        assert self._base is not None
        return self._base().reshape(self.outputs, self.width)


Formula = Callable[[Mapping[str, Tensor], WeightView], Tensor | tuple[Tensor, Tensor]]
"""What an adapter's parts make of a matrix: the change as ``[outputs, inputs, *kernel]``, any reshape of it, or factors
``up [outputs, r]`` and ``down [r, width]``. Parts that hold no floating-point numbers come as they are stored."""


@dataclass(frozen=True, slots=True, eq=False)
class ComputedChange(Change):
    """A change that ``formula`` makes of ``parts``.

    ``outputs`` and ``inputs`` are the target's sizes as far as the parts tell them. With a ``kernel``, ``inputs``
    counts channels; without one it is the width of a row, kernel and all. ``allows`` says what else must hold of the
    place. ``factored``: the formula gives factors; ``trained``: their rank, or the largest that a full change can
    have where it is less than any (0: it is not known).

    ``transposed``: the target is ``[in, out]``, unless its shape says otherwise; always so for embeddings, whose
    outputs are the features of a token. ``layer`` is the base's own tensor where it was saved along. ``flat``: the
    inputs may be those of a convolution, channels and kernel together, which only the base tells.
    """

    parts: Mapping[str, Stored]
    formula: Formula
    outputs: int | None = None
    inputs: int | None = None
    kernel: tuple[int, ...] | None = None
    allows: Callable[[int, int], bool] = lambda outputs, width: True
    factored: bool = False
    trained: int = 0
    transposed: bool = False
    scale: float | None = None
    layer: Stored | None = None
    flat: bool = False

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return tuple(self.parts.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """The target's shape, with -1 for sizes that only the base can tell."""
        sizes = (self.outputs or -1, self.inputs or -1, *(self.kernel or ()))
        if self.kind == "bias":
            return sizes[:1]
        return sizes[::-1] if self.transposed else sizes

    @property
    def rank(self) -> int:
        return self.trained

    @property
    def low_rank(self) -> bool:
        return self.factored

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self._lies(shape, False) or self._lies(shape, True)

    def _lies(self, shape: tuple[int, ...], transposed: bool) -> bool:
        """Whether a tensor of this shape may be the target, lying one way or the other."""
        if self.kind == "bias":
            return shape == (self.outputs,) and not transposed
        if len(shape) < 2 or (transposed and len(shape) > 2) or (self.kind == "embedding" and not transposed):
            return False
        place = WeightView(shape[::-1] if transposed else shape)
        if self.kernel is not None:
            known = place.shape[1] == self.inputs and _same_kernel(place.shape[2:], self.kernel)
        else:
            known = self.inputs in (None, place.width)
        return known and self.outputs in (None, place.outputs) and self.allows(place.outputs, place.width)

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self._lies(shape, self.transposed) == self.transposed

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        transposed = self.is_transposed(shape)
        parts = {name: part.read().to(dtype) if part.floating else part.read() for name, part in self.parts.items()}
        place = WeightView(shape[::-1] if transposed else shape, lambda: base().mT if transposed else base())
        made = self.formula(parts, place)
        if isinstance(made, tuple):
            return LowRank(*made, shape, transposed)
        value = made.reshape(place.shape)
        return Dense(value.mT.contiguous() if transposed else value)


def _same_kernel(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two kernels are the same but for trailing ones (of a convolution along one axis)."""
    longest = max(len(one), len(other))
    return one + (1,) * (longest - len(one)) == other + (1,) * (longest - len(other))
