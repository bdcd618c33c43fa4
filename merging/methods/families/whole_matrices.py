"""Base class of wrappers that look at whole matrices, in full or as factors."""

from __future__ import annotations

from typing import ClassVar, Literal

from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor
from merging.maths.site import Site
from merging.methods.contract.method import Grain
from merging.methods.contract.wrapper import Wrapper
from merging.methods.families.spectral import as_stored, matrices

__all__ = ["WholeMatrices", "as_change", "as_matrices", "as_matrix", "transpose"]


class WholeMatrices(Wrapper):
    """A wrapper that takes matrices whole. Vectors, convolutions and tables in full, and experts, pass unchanged."""

    needs_whole: ClassVar[bool] = True
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "shorter"
    workspace: ClassVar[int] = 6

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if site.kind == "matrix" else self.then.grain_at(site)


def as_matrices(stack: Stack, site: Site) -> list[Delta] | None:
    """Return the changes as matrices ``[out, in]``: factors of any tensor, or full matrices; None for other tensors."""
    if stack.low_rank:
        low = [delta for delta in stack.deltas if isinstance(delta, LowRank)]
        if low[0].up.dim() > 2:
            return None
        return [LowRank(delta.up, delta.down, (len(delta.up), delta.down.shape[1])) for delta in low]
    if site.kind != "matrix":
        return None
    return [Dense(value) for value in matrices(stack.dense(), site)]


def as_matrix(value: Tensor, form: LowRank | None, site: Site) -> Tensor:
    """Return a merged change in full as the matrix ``[out, in]`` that :func:`as_matrices` made of each change.

    ``form`` is a change of the stack, where these are factors, else None.
    """
    if form is None:
        return matrices(value, site)
    return value.mT if form.transposed else value.reshape(len(form.up), -1)


def as_change(matrix: Tensor, form: LowRank | None, site: Site) -> Dense:
    """Return a matrix ``[out, in]`` as a change in full of the tensor: the way back of :func:`as_matrix`."""
    if form is None:
        return Dense(as_stored(matrix, site))
    return Dense((matrix.mT if form.transposed else matrix).reshape(form.shape))


def transpose(change: Delta) -> Delta:
    """Return a matrix's change transposed."""
    if isinstance(change, LowRank):
        return LowRank(change.down.mT, change.up.mT, change.shape[::-1])
    return Dense(change.value.mT)
