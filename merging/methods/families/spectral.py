"""Base class of methods that decompose matrices into singular values and vectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.fast_svd import SvdAccuracy
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import joint_core
from merging.maths.parameters import Coefficient, Local
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Method, Statistics

__all__ = ["ExactSingular", "Singular", "Spectral", "as_stored", "matrices"]


class Spectral(Method):
    """A method that merges matrices one by one. Other tensors, and embedding tables unless `embeddings`, take the mean.

    The merge of matrices must not depend on their basis. Low-rank changes are then merged exactly, in their joint row
    and column spaces, as matrices of the sum of ranks.
    """

    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "shorter"

    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")
    embeddings: bool = Field(False, description="decompose embedding tables as well, which are averaged otherwise")

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if self.decomposes(site) else "element"

    @property
    def factored(self) -> bool:
        return True

    def decomposes(self, site: Site) -> bool:
        """Return whether a tensor is decomposed."""
        return site.kind in ("matrix", "experts") or (self.embeddings and site.kind == "embedding")

    def idle(self, site: Site) -> Mapping[str, str]:
        if self.decomposes(site) and site.kind == "embedding":
            return {}
        found = {"embeddings": "there is no embedding table"}
        if self.decomposes(site):
            return found
        everywhere = {"scale", "weights", "embeddings"}
        own = dict.fromkeys(type(self).model_fields.keys() - everywhere, f"{self.name} decomposes only matrices")
        return own | found

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        if not self.decomposes(site):
            return stack.weighted_sum([weight * self.scale for weight in self.others(len(stack))])
        if self.factored and stack.low_rank and len(stack.deltas[0].shape) == 2:
            deltas = [delta for delta in stack.deltas if isinstance(delta, LowRank)]
            up, down, cores = joint_core(deltas)
            merged = up @ self.combine(cores, site.side or min(len(up), down.shape[1]))
            like = deltas[0]
            return LowRank(merged.to(stack.dtype), down.to(stack.dtype), like.shape, like.transposed).scaled(self.scale)
        values = matrices(stack.dense(), site)
        size = site.side or min(values.shape[-2:])
        if values.dim() == 3:
            merged = self.combine(list(values), size)
        else:  # experts side by side
            merged = torch.stack([self.combine(list(each), size) for each in values.transpose(0, 1)])
        return Dense(as_stored(merged.to(values.dtype), site)).scaled(self.scale)

    def others(self, models: int) -> list[Coefficient]:
        """Return the weights of the models for tensors that are not decomposed."""
        return [1 / models] * models

    @abstractmethod
    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        """Return the merged matrix, float64, of changes ``[out, in]``.

        ``size`` is the shorter side of the full matrices, as the changes may be their cores.
        """


class Singular(Spectral):
    """A spectral method by singular values and vectors: of all directions, or of the leading ones.

    Large matrices are decomposed by :mod:`merging.maths.fast_svd`: on fine-tunes the merged matrix is then within a
    thousandth of the exact one.
    """

    svd: SvdAccuracy = Field(
        "fast", description="fast: matrices with sides above 1024 in float32, where its checks hold; exact: in float64"
    )


class ExactSingular(Singular):
    """A method by singular values and vectors that is not always within a thousandth in float32: `fast` is a choice."""

    svd: SvdAccuracy = Field(
        "exact", description="exact: in float64; fast: matrices with sides above 1024 in float32, where its checks hold"
    )


def matrices(values: Tensor, site: Site) -> Tensor:
    """Return matrices or tables as ``[..., out, in]``, from either layout in memory."""
    return values.mT if site.axis == 0 else values


def as_stored(values: Tensor, site: Site) -> Tensor:
    """Return matrices ``[..., out, in]`` in the layout of the tensor in memory."""
    return values.mT if site.axis == 0 else values
