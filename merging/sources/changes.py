"""The changes that adapters make to the tensors of their base; every scale is multiplied in when factors are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.stored import Stored

__all__ = [
    "AddedBias",
    "AddedTensor",
    "Change",
    "ChangeKind",
    "ExtractedChange",
    "FactorsChange",
    "FullChange",
    "LoraChange",
    "Replacement",
]

ChangeKind = Literal["linear", "embedding", "conv", "experts", "bias", "tokens", "full"]


@dataclass(frozen=True, slots=True, eq=False)
class Change:  # no ABC: whether a value is a Change is asked many times for each tensor
    """The change that an adapter makes to one tensor, ``target``, named as in the adapter (``...query.weight``)."""

    target: str
    kind: ChangeKind
    needs_base: str | None = field(default=None, kw_only=True)
    """Why the change cannot be computed without the base's tensor; None if it can."""
    optional: bool = field(default=False, kw_only=True)
    """Whether the base may lack the target, as the bias of a layer that may have none."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Stored, ...]:
        """The tensors that are read from the adapter's file."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The target's shape, as far as it is known without the base."""

    @property
    def rank(self) -> int:
        """The rank of the change in training, 0 if it was trained in full."""
        return 0

    @property
    def low_rank(self) -> bool:
        """Whether it is read as factors of this rank, and not as a dense tensor."""
        return False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the base's tensor may have this shape."""
        return shape == self.shape

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        """Whether a target of this shape is the transpose of ``up @ down``, for a change that is read as factors."""
        return False

    @abstractmethod
    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        """Return the change of a base tensor of this shape, computed in ``dtype``; ``base`` reads the base tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraChange(Change):
    """The change ``scale * up @ down`` of LoRA, and its variants DoRA, PiSSA and OLoRA.

    Attributes:
        down: The factor ``[r, in]``; convolutions have their kernel here (``[r, in, *k]``).
        up: The factor ``[out, r]``.
        scale: The factor of the product.
        transposed: Whether the target is ``[in, out]``, as in GPT-2's Conv1D and in embeddings.
        magnitude: The vector of DoRA.
        layer: The base's own tensor if the adapter saved it too, as PEFT does for embeddings and heads.
        start: What the training subtracted from the base at its start: the ``r`` leading singular directions
            (``"pissa"``) or the first ``r`` directions of its QR decomposition (``"olora"``).
    """

    down: Stored
    up: Stored
    scale: float
    transposed: bool = False
    magnitude: Stored | None = None
    layer: Stored | None = None
    start: Literal["pissa", "olora"] | None = None

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return (self.down, self.up) if self.magnitude is None else (self.down, self.up, self.magnitude)

    @property
    def shape(self) -> tuple[int, ...]:
        natural = (self.up.shape[0], *self.down.shape[1:])
        return natural[::-1] if self.transposed else natural

    @property
    def rank(self) -> int:
        return self.down.shape[0] * (2 if self.start else 1)

    @property
    def low_rank(self) -> bool:
        return self.magnitude is None

    def fits(self, shape: tuple[int, ...]) -> bool:
        # A flag in a config is weaker evidence than a shape: the base decides, and the flag only where it is square.
        return self._is_of(shape) or (self.kind == "linear" and shape == self.shape[::-1])

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self.transposed == self._is_of(shape)

    def _is_of(self, shape: tuple[int, ...]) -> bool:
        """Whether the factors make a tensor of this shape: a matrix, or a convolution with a kernel of 1."""
        longest = max(len(shape), len(self.shape))
        one, other = (each + (1,) * (longest - len(each)) for each in (shape, self.shape))
        return one == other and len(shape) > 1

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        rank = self.down.shape[0]
        up = self.up.read().to(dtype).reshape(-1, rank) * self.scale
        down = self.down.read().to(dtype).reshape(rank, -1)
        delta = LowRank(up, down, shape, self.is_transposed(shape))
        if self.start:
            delta = _without_start(delta, base(), rank, self.start, self.scale)
        if self.magnitude is not None:
            return _dora(delta, base(), self.magnitude.read().to(dtype).flatten())
        return delta


def _without_start(delta: LowRank, weight: Tensor, rank: int, start: str, scale: float) -> LowRank:
    """Return the change relative to the original base, for an adapter trained on the rest that its start left."""
    matrix = weight.mT if delta.transposed else weight.reshape(len(weight), -1)
    if start == "pissa":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        up, down = u[:, :rank] * s[:rank], vh[:rank]
    else:
        q, r = torch.linalg.qr(matrix)
        up, down = q[:, :rank] * scale, r[:rank]
    return LowRank(torch.cat([delta.up, -up], 1), torch.cat([delta.down, down], 0), delta.shape, delta.transposed)


def _dora(delta: LowRank, weight: Tensor, magnitude: Tensor) -> Dense:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): every output of W + delta gets the length ``magnitude``."""
    total = weight + delta.dense()
    # One length an output: a column where the target is [in, out], else everything under the first axis.
    axes = (0,) if delta.transposed else tuple(range(1, total.dim()))
    norm = total.square().sum(axes, keepdim=True).sqrt()
    return Dense(total * (magnitude.reshape(norm.shape) / norm) - weight)


@dataclass(frozen=True, slots=True, eq=False)
class FullChange(Change):
    """A change that the adapter stores as one tensor of the target's shape."""

    value: Stored

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return (self.value,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@dataclass(frozen=True, slots=True, eq=False)
class AddedBias(FullChange):
    """``scale * value``, added to a bias (PEFT's ``lora_bias``)."""

    scale: float

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        return Dense(self.value.read().to(dtype) * self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Replacement(FullChange):
    """A tensor that replaces the base's tensor: a module saved in full, or a trained bias."""

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        return Dense(self.value.read().to(dtype) - base())


@dataclass(frozen=True, slots=True, eq=False)
class ExtractedChange(Replacement):
    """The difference of a full model's tensor from the base's, to be written as factors.

    ``transposed``: the target is the transpose of the factors' product.
    """

    transposed: bool = False

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self.transposed


@dataclass(frozen=True, slots=True, eq=False)
class AddedTensor(FullChange):
    """A tensor that is added to the base's tensor."""

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        return Dense(self.value.read().to(dtype))


@dataclass(frozen=True, slots=True, eq=False)
class FactorsChange(Change):
    """The change ``up @ down`` of a tensor of one ``size``: ``up`` is ``[..., out, r]`` and ``down`` ``[..., r, in]``.

    ``transposed``: the target is the transpose of their product.
    """

    down: Stored
    up: Stored
    size: tuple[int, ...]
    transposed: bool = False

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return (self.down, self.up)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def rank(self) -> int:
        return self.up.shape[-1]

    @property
    def low_rank(self) -> bool:
        return True

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        return self.transposed

    def read(self, shape: tuple[int, ...], base: Callable[[], Tensor], dtype: torch.dtype) -> Delta:
        return LowRank(self.up.read().to(dtype), self.down.read().to(dtype), self.size, self.transposed)
