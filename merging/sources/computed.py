"""Changes that a format's formula computes from an adapter's tensors when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.changes import Change
from merging.sources.stored import Stored

__all__ = ["ComputedChange", "Formula", "Parts", "WeightView"]


class WeightView:
    """The base's tensor as a formula sees it: ``[outputs, inputs, *kernel]``, whatever its orientation in the base.

    ``width`` is the length of a row of its matrix: ``inputs`` times the size of the kernel.
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


Parts = Mapping[str, Tensor]
"""The tensors of one module, by their names in its formula."""

Formula = Callable[[Parts, WeightView], Tensor | tuple[Tensor, Tensor]]
"""A function from an adapter's parts and a weight to the change: as ``[outputs, inputs, *kernel]``, any reshape of it,
or factors ``up [outputs, r]`` and ``down [r, width]``. Integer parts are passed as they are stored."""


@dataclass(frozen=True, slots=True, eq=False)
class ComputedChange(Change):
    """A change that ``formula`` computes from ``parts``.

    Attributes:
        parts: The stored tensors, by their names in the formula.
        formula: The function that computes the change.
        outputs: The target's outputs, as far as the parts determine them.
        inputs: With a ``kernel`` the input channels, without one the width of a row, kernel included.
        kernel: The kernel's sizes.
        allows: Further conditions on outputs and width.
        factored: Whether the formula returns factors.
        trained: The rank of the factors, or an upper bound of a full change's rank; 0 if unknown.
        transposed: Whether the target is ``[in, out]``, unless its shape says otherwise; always so for embeddings,
            whose outputs are the features of a token.
        layer: The base's own tensor if the adapter saved it too.
        flat: Whether the inputs may be channels and kernel of a convolution together, which only the base decides.
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
        """The target's shape, with -1 for sizes that only the base determines."""
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
        """Whether a tensor of this shape may be the target in this orientation."""
        if self.kind == "bias":
            return shape == (self.outputs,) and not transposed
        if len(shape) < 2 or (transposed and len(shape) > 2) or (self.kind == "embedding" and not transposed):
            return False
        view = WeightView(shape[::-1] if transposed else shape)
        if self.kernel is not None:
            known = view.shape[1] == self.inputs and _same_kernel(view.shape[2:], self.kernel)
        else:
            known = self.inputs in (None, view.width)
        return known and self.outputs in (None, view.outputs) and self.allows(view.outputs, view.width)

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self._lies(shape, self.transposed) == self.transposed

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        transposed = self.is_transposed(shape)
        parts = {name: part.read().to(dtype) if part.floating else part.read() for name, part in self.parts.items()}
        view = WeightView(shape[::-1] if transposed else shape, lambda: base().mT if transposed else base())
        made = self.formula(parts, view)
        if isinstance(made, tuple):
            return LowRank(*made, shape, transposed)
        value = made.reshape(view.shape)
        return Dense(value.mT.contiguous() if transposed else value)


def _same_kernel(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two kernels agree, apart from trailing ones (of a convolution along one axis)."""
    longest = max(len(one), len(other))
    return one + (1,) * (longest - len(one)) == other + (1,) * (longest - len(other))
