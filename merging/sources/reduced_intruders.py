"""Changes of adapters with reduced intruder dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.intruders import find_intruders
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.changes import Change
from merging.sources.stored import Stored

__all__ = ["ReducedIntruders"]


@dataclass(frozen=True, slots=True, eq=False)
class ReducedIntruders(Change):
    """A change of a matrix whose intruder dimensions are multiplied by a number (Shuttleworth et al. 2024, section 5).

    As PEFT's ``reduce_intruder_dimension``: ``W + D`` has the intruders ``sum_j s_j u_j v_j^T`` among its leading
    singular directions, and the change becomes ``D + (factor - 1) sum_j s_j u_j v_j^T``. Left singular vectors are
    directions of the layer's output, also in transposed layers, where PEFT takes the inputs' directions.

    Attributes:
        change: the change itself.
        factor: the factor of intruder dimensions.
        threshold: the largest cosine of an intruder to any left singular vector of the base.
        leading: the number of leading singular directions among which intruders are looked for.
    """

    change: Change
    factor: float
    threshold: float
    leading: int

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return self.change.tensors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.change.shape

    @property
    def rank(self) -> int:
        return self.change.rank

    @property
    def low_rank(self) -> bool:
        return self.change.low_rank

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.change.fits(shape)

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self.change.is_transposed(shape)

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        delta = self.change.read(shape, base, dtype)
        transposed = self.is_transposed(shape)
        weight = _as_matrix(base(), transposed).double()
        product = delta.up.double() @ delta.down.double() if isinstance(delta, LowRank) else None
        change = _as_matrix(delta.dense(), transposed).double() if product is None else product
        up, down = find_intruders(weight, weight + change, k=self.leading, threshold=self.threshold)
        up = up * (self.factor - 1)
        if isinstance(delta, LowRank):
            ups, downs = torch.cat([delta.up, up.to(dtype)], 1), torch.cat([delta.down, down.to(dtype)])
            return LowRank(ups, downs, shape, delta.transposed)
        reduction = (up @ down).to(dtype)
        return Dense(delta.dense() + (reduction.mT if transposed else reduction).reshape(shape))


def _as_matrix(value: Tensor, transposed: bool) -> Tensor:
    """Return a layer's tensor as a matrix ``[out, in]``."""
    return value.mT if transposed else value.reshape(len(value), -1)
