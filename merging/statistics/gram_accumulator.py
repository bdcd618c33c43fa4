"""Gram matrices of inputs that arrive piece by piece: exact for narrow layers, by leading directions for wide ones."""

from __future__ import annotations

from merging.maths.layer_statistics import InputGram
from merging.maths.lazy_torch import Tensor, torch

__all__ = ["GramAccumulator", "leading_directions"]


class GramAccumulator:
    """The sum of ``x x^T`` over inputs ``x``, with about ``directions`` leading directions and the exact diagonal.

    Rows are collected at first, which are fewer than the layer's inputs for few examples. A layer with at most three
    times as many inputs as ``directions`` is summed in full then. For a wider one, rows up to three times
    ``directions`` are replaced by as many leading directions as are kept.

    Attributes:
        count: the number of inputs.
    """

    def __init__(self, width: int, directions: int, device: torch.device) -> None:
        self.count = 0
        self._width = width
        self._keep = min(width, directions)
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._sum: Tensor | None = None
        self._rows: list[Tensor] = []
        self._held = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs ``[n, in]``."""
        inputs = inputs.detach().float()
        self.count += len(inputs)
        self._squares += inputs.double().square().sum(0)
        self._rows.append(inputs.clone())
        self._held += len(inputs)
        if self._width <= 3 * self._keep:
            if self._held > self._width:
                self._fold()
        elif self._held > 3 * self._keep:
            self._rows = [self._leading_rows()]
            self._held = len(self._rows[0])

    def _fold(self) -> None:
        """Add the rows to the full sum."""
        rows = torch.cat(self._rows).double()
        total = rows.mT @ rows
        self._sum = total if self._sum is None else self._sum + total
        self._rows, self._held = [], 0

    def _leading_rows(self) -> Tensor:
        """Return the leading directions of the rows, as rows with nearly the same Gram matrix."""
        rows = torch.cat(self._rows).double()
        if len(rows) > self._width:
            return leading_directions(rows.mT @ rows, self._keep).mT.float()
        _, vectors = torch.linalg.eigh(rows @ rows.mT)
        found: Tensor = (vectors.flip(1)[:, : self._keep].mT @ rows).float()
        return found

    def result(self) -> InputGram:
        """Return the mean, as its leading directions and the rest of its diagonal; float64, on the CPU."""
        if self._sum is not None:
            if self._rows:
                self._fold()
            directions = leading_directions(self._sum / self.count, self._keep)
        else:
            directions = self._leading_rows().mT.double() / self.count**0.5
        diagonal = self._squares / self.count
        rest = (diagonal - directions.square().sum(1)).clamp(min=0)
        return InputGram(directions.cpu(), rest.cpu())


def leading_directions(matrix: Tensor, keep: int) -> Tensor:
    """Return ``[in, k]``, the leading eigenvectors of a definite matrix times the roots of their eigenvalues.

    Directions with eigenvalues below rounding are left out, and at least one is kept.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0).clamp(min=0)[:keep], vectors.flip(1)[:, :keep]
    kept = max(1, int((values > 1e-12 * values[0]).sum()))
    found: Tensor = vectors[:, :kept] * values[:kept].sqrt()
    return found
