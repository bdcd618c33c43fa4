"""Statistics of a layer that were gathered from examples: the Gram matrix of its inputs, and its Fisher information."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from merging.display.tables import Displayed
from merging.maths.lazy_torch import Tensor, torch

__all__ = ["InputGram", "LayerStatistics", "solve_right", "sum_grams"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class InputGram(Displayed):
    """The mean of ``x x^T`` over a layer's inputs ``x``, as ``directions @ directions.T + diag(rest)``, in float64.

    ``directions`` is ``[in, k]``, and ``rest`` ``[in]`` is not negative: rounding either leaves the matrix definite.
    """

    directions: Tensor
    rest: Tensor

    def _display_fields(self) -> dict[str, object]:
        return {"inputs": len(self.rest), "directions": self.directions.shape[1]}

    def to(self, device: torch.device) -> InputGram:
        """Return it on a device, in float64."""
        return InputGram(self.directions.to(device).double(), self.rest.to(device).double())

    def diagonal(self) -> Tensor:
        """Return the mean squares of the inputs, ``[in]``."""
        return self.directions.square().sum(1) + self.rest

    def dense(self) -> Tensor:
        """Return the matrix ``[in, in]``."""
        return self.directions @ self.directions.mT + torch.diag(self.rest)

    def shrink(self, keep: float, ridge: float) -> InputGram:
        """Return ``keep * G + (1 - keep) * diag(G) + ridge * I``."""
        diagonal = self.diagonal()
        return InputGram(self.directions * keep**0.5, keep * self.rest + (1 - keep) * diagonal + ridge)

    def scaled(self, factor: float) -> InputGram:
        """Return the matrix times a number that is not negative."""
        return InputGram(self.directions * factor**0.5, self.rest * factor)

    def apply(self, rows: Tensor) -> Tensor:
        """Return ``rows @ G`` of ``rows`` ``[m, in]``."""
        return (rows @ self.directions) @ self.directions.mT + rows * self.rest

    def energy(self, rows: Tensor) -> float:
        """Return the mean squared length of ``rows @ x`` over the inputs, of ``rows`` ``[m, in]``."""
        squares = (rows @ self.directions).square().sum() + (rows.square() @ self.rest).sum()
        return float(squares)

    def root(self, rows: Tensor) -> Tensor:
        """Return ``[m, k + in]`` with the products of ``rows @ G @ rows.T`` among its rows."""
        return torch.cat([rows @ self.directions, rows * self.rest.sqrt()], 1)


def sum_grams(grams: Sequence[InputGram]) -> InputGram:
    """Return the sum of Gram matrices, whose directions are put side by side."""
    rest = grams[0].rest.clone()
    for gram in grams[1:]:
        rest += gram.rest
    return InputGram(torch.cat([gram.directions for gram in grams], 1), rest)


def solve_right(rows: Tensor, gram: InputGram) -> Tensor:
    """Return ``rows @ G^-1`` of ``rows`` ``[m, in]``, where every entry of ``gram.rest`` is positive.

    With fewer directions than inputs the matrix ``[in, in]`` is never built (Woodbury's identity).
    """
    width, count = gram.directions.shape
    if count >= width:
        factor = torch.linalg.cholesky(gram.dense())
        return torch.cholesky_solve(rows.mT, factor).mT
    root = gram.rest.sqrt()
    inner = gram.directions / root[:, None]
    small = inner.mT @ inner + torch.eye(count, dtype=inner.dtype, device=inner.device)
    scaled = rows / root
    found = torch.cholesky_solve((scaled @ inner).mT, torch.linalg.cholesky(small)).mT
    return (scaled - found @ inner.mT) / root


class LayerStatistics(ABC):
    """The statistics of one tensor in one model, read when they are needed."""

    @abstractmethod
    def read_inputs(self) -> InputGram | None:
        """Return the Gram matrix of the layer's inputs; None where it was not gathered."""

    @abstractmethod
    def read_fisher(self, start: int, count: int) -> Tensor | None:
        """Return elements of the Fisher information's diagonal, float32 ``[count]``, flat from ``start`` on.

        They are divided by their root mean square over the whole model. None where they were not gathered.
        """
