"""Reductions over a whole model in bounded memory, fed tile by tile, in any order and from several threads.

The result depends on the values alone: not on the order of the tiles, nor on how threads share them.
The protocol, for any number of threads::

    total = reduction.start()
    while True:
        workers = [total.fork() for _ in range(threads)]    # each is fed by one thread: worker.add(values, key)
        for worker in workers:
            total.merge(worker)
        if not total.next():
            break
    total.result()

One thread feeds ``total`` itself. Every sweep sees the same values, each of them once, except for a first sweep that is
a sample (:meth:`Accumulator.begin_sample`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["Accumulator", "Reduction", "State", "Sum", "check_count", "column_pieces", "model_rows"]

S = TypeVar("S", bound="Accumulator")

_SPAN = 1 << 14
"""Elements summed at once: below torch's grain for splitting one sum among threads, which would change last bits."""

_ULP = 1074
"""Every finite double is a multiple of 2**-1074."""


@dataclass(frozen=True, slots=True)
class Reduction(ABC):
    """A reduction over all elements of n models at once: a value, which any number of runs may share."""

    @property
    @abstractmethod
    def sweeps(self) -> int:
        """The number of times that the data is gone through."""

    @abstractmethod
    def start(self) -> Accumulator:
        """Return a new accumulator, before the first sweep."""

    def widen(self, dtype: torch.dtype) -> Reduction:
        """Return the reduction for values of float32 or float64."""
        return self


@dataclass(frozen=True, slots=True)
class State:
    """The state of an accumulator: values of JSON, and tensors on the CPU."""

    plain: Any
    tensors: list[Tensor] = field(default_factory=list)


class Accumulator(ABC):
    """The values gathered so far. It belongs to one thread at a time and can be pickled.

    Attributes:
        sampling: whether the current sweep is a sample.
    """

    sampling = False

    def begin_sample(self) -> bool:
        """Make the first sweep a sample, which may leave out any values, if that saves another sweep: return whether.

        Called before anything is added. The result is the same.
        """
        return False

    @abstractmethod
    def add(self, values: Any, key: object) -> None:
        """Take in one tile, ``[n, ...]`` floating point, of n models; ``key`` names it in errors.

        Raises ValueError for values that poison the result, or for another number of models than before.
        """

    @abstractmethod
    def fork(self: S) -> S:
        """Return an empty accumulator at the same sweep, for another thread."""

    @abstractmethod
    def merge(self: S, other: S) -> None:
        """Join the values of another accumulator of the same sweep, which must not be used afterwards."""

    @abstractmethod
    def next(self) -> bool:
        """End a sweep, and return whether the data must be gone through once more."""

    @abstractmethod
    def result(self) -> Tensor:
        """Return the result, one row a model: float64 on the CPU."""

    def state(self) -> State | None:
        """Return the values gathered so far as a state, which must not be changed; None for a kind without states."""
        return None

    def restore(self, state: State) -> None:
        """Take over a state of an accumulator of the same reduction, in place of the values so far.

        Raises TypeError for a kind without states.
        """
        raise TypeError(f"{type(self).__name__} has no states to go on from")


@dataclass(frozen=True, slots=True)
class Sum(Reduction):
    """The sum of all elements of each model: ``[n]`` float64; empty tiles sum to 0, no tile at all gives ``[0]``.

    A tile is summed in float64, by spans of 16,384 elements of each model's flattened row; the span sums are combined
    exactly and rounded once. Infinities and NaN raise ValueError.
    """

    @property
    def sweeps(self) -> int:
        return 1

    def start(self) -> Accumulator:
        return _Total()


class _Total(Accumulator):
    """Exact totals, as whole numbers of 2**-1074: addition in any order, merging and pickling for free."""

    def __init__(self) -> None:
        self.totals: list[int] = []

    def add(self, values: Tensor, key: object) -> None:
        rows = model_rows(values)
        self._plus([0] * len(rows))
        for piece in column_pieces(rows, 1 << 18):
            sums = _span_sums(piece)
            if not bool(sums.isfinite().all()):
                raise ValueError(f"{key} holds infinities or NaN, which have no sum")
            self._plus([sum(map(_exact, row)) for row in sums.tolist()])

    def fork(self) -> _Total:
        return _Total()

    def merge(self, other: _Total) -> None:
        if other.totals:
            self._plus(other.totals)

    def state(self) -> State:
        return State([hex(total) for total in self.totals])

    def restore(self, state: State) -> None:
        self.totals = [int(total, 16) for total in state.plain]

    def _plus(self, totals: list[int]) -> None:
        check_count(len(self.totals) or len(totals), len(totals))
        self.totals = [a + b for a, b in zip(self.totals or [0] * len(totals), totals, strict=True)]

    def next(self) -> bool:
        return False

    def result(self) -> Tensor:
        # true division of integers rounds once, correctly
        return torch.tensor([total / (1 << _ULP) for total in self.totals], dtype=torch.float64)


def model_rows(values: Tensor) -> Tensor:
    """Return values as ``[n, elements]`` without a graph; contiguous, as the last bits of a sum depend on it."""
    return values.detach().reshape(len(values), math.prod(values.shape[1:])).contiguous()


def column_pieces(rows: Tensor, width: int) -> Iterator[Tensor]:
    """Yield blocks of columns: small enough to bound the memory, large enough that threads do not wait for the lock."""
    width = width if rows.device.type == "cpu" else 1 << 22
    return (rows[:, start : start + width] for start in range(0, rows.shape[1], width))


def check_count(models: int, got: int) -> None:
    """Raise ValueError for values of another number of models than before."""
    if got != models:
        raise ValueError(f"values of {got} models, where there were {models} before")


def _span_sums(rows: Tensor) -> Tensor:
    """Return sums ``[n, spans]`` float64, each within one model and over at most ``_SPAN`` elements."""
    spans = rows.shape[1] // _SPAN
    whole = rows[:, : spans * _SPAN].reshape(len(rows), spans, _SPAN).sum(-1, dtype=torch.float64)
    rest = rows[:, spans * _SPAN :].sum(-1, keepdim=True, dtype=torch.float64)
    return torch.cat([whole, rest], dim=1)


def _exact(value: float) -> int:
    """Return a finite double in units of 2**-1074."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << (_ULP - denominator.bit_length() + 1)
