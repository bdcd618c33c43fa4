"""The change of one tensor, dense or a product of two thin factors, and the stack of several models' changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from merging.display.tables import Displayed
from merging.errors import InputError, OptionError
from merging.maths.kernels.switch import usable
from merging.maths.kernels.weighted_sums import add_weighted
from merging.maths.layer_statistics import LayerStatistics
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.stored_values import StoredValues
from merging.type_checks import describe_value

__all__ = ["Delta", "Dense", "LowRank", "Stack", "sum_in_order", "weighted_sum"]

Scalar = float | Tensor


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Dense(Displayed):
    """A change (or a weight) written out in full: ``value`` has the shape of the tensor it belongs to.

    Example:
        >>> import torch, merging
        >>> merging.Dense(torch.ones(2, 3)).scaled(0.5)
        Dense(shape=(2, 3), dtype=torch.float32)
    """

    value: Tensor

    def __post_init__(self) -> None:
        _check_tensor("value", self.value)

    def _display_fields(self) -> dict[str, object]:
        return {"shape": self.shape, "dtype": self.value.dtype}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def dense(self) -> Tensor:
        """Return the change itself, ``[*shape]``."""
        return self.value

    def rows(self, start: int, stop: int) -> Dense:
        """Return rows ``start`` to ``stop`` of the first axis."""
        return Dense(self.value[start:stop])

    def to(self, device: torch.device | str) -> Dense:
        """Return the change on a device."""
        return Dense(self.value.to(device))

    def scaled(self, factor: Scalar) -> Dense:
        """Return the change times a number."""
        return Dense(self.value * factor)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise OptionError(f"{name} should be a tensor, and is {describe_value(value)}")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LowRank(Displayed):
    """A change kept as ``up @ down``, with every scale (such as alpha / r) folded into ``up``.

    ``up`` is ``[..., out, r]`` and ``down`` ``[..., r, in]``; leading axes are batches (experts). ``shape`` is the
    shape of the tensor in the base: the product itself, its transpose when ``transposed`` (GPT-2's Conv1D and
    embeddings), or its reshape (convolutions). Rank 0 is the zero change.

    Example:
        >>> import torch, merging
        >>> merging.LowRank(torch.ones(2, 1), torch.ones(1, 3), (2, 3)).dense()
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    up: Tensor
    down: Tensor
    shape: tuple[int, ...]
    transposed: bool = False

    def __post_init__(self) -> None:
        _check_tensor("up", self.up)
        _check_tensor("down", self.down)
        matrices = self.up.dim() > 1 and self.down.dim() > 1
        if not matrices or self.up.shape[-1] != self.down.shape[-2] or self.up.shape[:-2] != self.down.shape[:-2]:
            raise InputError(f"factors {tuple(self.up.shape)} and {tuple(self.down.shape)} do not multiply")
        if not isinstance(self.shape, tuple) or not all(isinstance(size, int) for size in self.shape):
            raise OptionError(f"shape should be a tuple of whole numbers, and is {describe_value(self.shape)}")
        if not isinstance(self.transposed, bool):
            raise OptionError(f"transposed should be True or False, and is {describe_value(self.transposed)}")
        if self.up.shape[:-1].numel() * self.down.shape[-1] != prod(self.shape):
            raise InputError(
                f"factors {tuple(self.up.shape)} and {tuple(self.down.shape)} do not make a tensor {self.shape}"
            )

    def _display_fields(self) -> dict[str, object]:
        facts: dict[str, object] = {"shape": self.shape, "rank": self.rank, "dtype": self.up.dtype}
        return {**facts, "transposed": True} if self.transposed else facts

    @classmethod
    def zero(cls, like: LowRank) -> LowRank:
        """Return the zero change of the same tensor, as factors of rank 0."""
        return cls(like.up[..., :0], like.down[..., :0, :], like.shape, like.transposed)

    @property
    def rank(self) -> int:
        return self.up.shape[-1]

    def dense(self) -> Tensor:
        """Return the change written out, ``[*shape]``."""
        product = self.up @ self.down
        return (product.mT if self.transposed else product).reshape(self.shape)

    def rows(self, start: int, stop: int) -> LowRank:
        """Return rows ``start`` to ``stop`` of the tensor's first axis, still as factors."""
        shape = (stop - start, *self.shape[1:])
        if self.up.dim() > 2:
            return LowRank(self.up[start:stop], self.down[start:stop], shape, self.transposed)
        if self.transposed:
            return LowRank(self.up, self.down[:, start:stop], shape, True)
        return LowRank(self.up[start:stop], self.down, shape)

    def oriented(self, transposed: bool) -> LowRank:
        """Return the change as factors of the tensor, or of its transpose; convolutions have no transpose."""
        if transposed == self.transposed:
            return self
        return LowRank(self.down.mT, self.up.mT, self.shape, transposed)

    def to(self, device: torch.device | str) -> LowRank:
        """Return the change on a device."""
        return LowRank(self.up.to(device), self.down.to(device), self.shape, self.transposed)

    def scaled(self, factor: Scalar) -> LowRank:
        """Return the change times a number, which goes into ``up``."""
        return LowRank(self.up * factor, self.down, self.shape, self.transposed)


Delta = Dense | LowRank


class Stack(Displayed):
    """The changes of ``n`` models in one tensor, or in one block of it.

    ``models`` holds a key of each model's content, for methods that draw random numbers. ``present`` says which models
    touch the tensor at all; the change of one that does not is zero. ``base`` holds the base's values of the same
    piece, for methods that look at them. ``memo`` holds what methods computed of these very
    values, by keys of their own: a block that is gone through several times keeps it. ``layer_statistics`` holds the
    statistics of examples of the whole tensor, one entry a model, where a method needs them.
    """

    __slots__ = ("_deltas", "_stored", "_values", "base", "layer_statistics", "memo", "models", "present")

    def __init__(
        self, deltas: Sequence[Delta], models: Sequence[str] | None = None, present: Sequence[bool] | None = None
    ) -> None:
        self._deltas: tuple[Delta, ...] | None = tuple(deltas)
        self._values: Tensor | None = None
        self._stored: StoredValues | None = None
        self._describe(len(deltas), models, present)

    @classmethod
    def of(cls, values: Tensor, models: Sequence[str] | None = None, present: Sequence[bool] | None = None) -> Stack:
        """Return a stack over one tensor ``[n, *shape]`` that holds the models' changes."""
        stack = cls.__new__(cls)
        stack._deltas, stack._values, stack._stored = None, values, None
        stack._describe(values.shape[0], models, present)
        return stack

    @classmethod
    def of_stored(cls, stored: StoredValues, models: Sequence[str], present: Sequence[bool]) -> Stack:
        """Return a stack whose changes are decoded when they are asked for."""
        stack = cls.__new__(cls)
        stack._deltas, stack._values, stack._stored = None, None, stored
        stack._describe(len(stored.values), models, present)
        return stack

    def _describe(self, n: int, models: Sequence[str] | None, present: Sequence[bool] | None) -> None:
        self.models = tuple(models) if models is not None else tuple(map(str, range(n)))
        self.present = tuple(present) if present is not None else (True,) * n
        self.base: Tensor | None = None
        self.memo: dict[object, Tensor] | None = None
        self.layer_statistics: tuple[LayerStatistics | None, ...] = ()

    def __len__(self) -> int:
        return len(self.models)

    def _display_fields(self) -> dict[str, object]:
        facts: dict[str, object] = {"models": len(self), "present": sum(self.present), "low_rank": self.low_rank}
        return {**facts, "shape": self.shape} if len(self) else facts

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """One change a model, in the user's order."""
        if self._deltas is None:
            self._deltas = tuple(Dense(value) for value in self.dense())
        return self._deltas

    @property
    def low_rank(self) -> bool:
        """Whether every change is kept as factors."""
        return (
            self._values is None and self._stored is None and all(isinstance(delta, LowRank) for delta in self.deltas)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values."""
        if self._stored is not None:
            return torch.float32
        first = self.deltas[0]
        return first.up.dtype if isinstance(first, LowRank) else first.value.dtype

    @property
    def device(self) -> torch.device:
        """The device of the values."""
        first = self.deltas[0]
        return first.up.device if isinstance(first, LowRank) else first.value.device

    def with_statistics(self, statistics: Sequence[LayerStatistics | None]) -> Stack:
        """Give the stack the statistics of examples, and return it."""
        self.layer_statistics = tuple(statistics)
        return self

    def dense(self) -> Tensor:
        """Return all changes written out in one tensor, ``[n, *shape]``."""
        if self._values is None and self._stored is not None:
            self._values = self._stored.decode()
        elif self._values is None:
            self._values = torch.stack([delta.dense() for delta in self.deltas])
        return self._values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a change."""
        if self._stored is not None:
            return self._stored.shape
        return tuple(self._values.shape[1:]) if self._values is not None else self.deltas[0].shape

    @property
    def stored(self) -> StoredValues:
        """All changes as they are stored, or written out where they are not stored as such."""
        if self._stored is not None:
            return self._stored
        values = self.dense()
        return StoredValues(values.reshape(len(values), -1), None, tuple(values.shape[1:]), lambda: values)

    def rows(self, start: int, stop: int) -> Stack:
        """Return the same rows of every change."""
        if self._deltas is None:
            some = Stack.of(self.dense()[:, start:stop], self.models, self.present)
        else:
            some = Stack([delta.rows(start, stop) for delta in self.deltas], self.models, self.present)
        return some.with_statistics(self.layer_statistics)

    def map(self, function: Callable[[Delta], Delta]) -> Stack:
        """Return the stack with ``function`` applied to each change."""
        changed = Stack([function(delta) for delta in self.deltas], self.models, self.present)
        return changed.with_statistics(self.layer_statistics)

    def weighted_sum(self, weights: Iterable[Scalar]) -> Delta:
        """Return ``sum_i w_i delta_i``: concatenated factors (exact, of the sum of the ranks) or a dense tensor."""
        weights = list(weights)
        if self.low_rank:
            return _concatenate([d for d in self.deltas if isinstance(d, LowRank)], weights)
        summed = add_weighted(self.stored, weights) if usable() else None
        return Dense(weighted_sum(self.dense(), weights) if summed is None else summed)


def _concatenate(deltas: Sequence[LowRank], weights: Sequence[Scalar]) -> LowRank:
    """Return ``[w_1 B_1 | ... | w_n B_n]`` and ``[A_1; ...; A_n]``, not averaged factors, which add cross terms."""
    first = deltas[0]
    up = torch.cat([delta.up * weight for delta, weight in zip(deltas, weights, strict=True)], dim=-1)
    down = torch.cat([delta.down for delta in deltas], dim=-2)
    return LowRank(up, down, first.shape, first.transposed)


def sum_in_order(values: Tensor | Sequence[Tensor]) -> Tensor:
    """Return ``sum_i values_i``, added up in order, which torch's own sum does not always do."""
    return weighted_sum(values, [1.0] * len(values))


def weighted_sum(values: Tensor | Sequence[Tensor], weights: Sequence[Scalar]) -> Tensor:
    """Return ``sum_i w_i values_i``, added up in order."""
    taken = 1
    if (
        len(weights) > 1
        and not isinstance(weights[1], Tensor)
        and not isinstance(weights[0], Tensor)
        and weights[0] == 1
    ):
        total, taken = torch.add(values[0], values[1], alpha=weights[1]), 2  # one pass over the numbers less
    else:
        total = values[0] * weights[0]
    for value, weight in zip(values[taken:], weights[taken:], strict=True):
        # The scalar form fuses product and sum without a temporary; a tensor weight keeps its gradient.
        total = total + value * weight if isinstance(weight, Tensor) else total.add_(value, alpha=weight)
    return total
