"""Competition among changes by compiled kernels: each step returns None where torch must compute it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merging.maths.delta import Stack
from merging.maths.kernels.steps import numbers_of, stored_values
from merging.maths.kernels.switch import run_kernel
from merging.maths.kernels.workspaces import make_workspace
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.stored_values import StoredValues

__all__ = ["TANH_IS_LINEAR", "Competition"]

TANH_IS_LINEAR = 2.0**-13
"""The largest number whose tanh is the number itself in float32: x^3 / 3 is less than half of its last bit."""

_PIECE = 1 << 16
"""Entries of each model that are scored at once, so that their scores stay in the cache."""

_FEW = 16
"""One product in this many may be too large for a tanh that is the number itself; of more, all are computed."""


@dataclass(frozen=True, slots=True)
class Competition:
    """How changes compete.

    Attributes:
        ends: the ends of each model's magnitudes, ``[n, 2]``.
        signed: whether changes agree with the sum of signed sizes, instead of with the sum of changes.
    """

    ends: Tensor
    signed: bool

    def score(self, stack: Stack) -> Tensor | None:
        """Return the score of each change, ``[n, elements]``."""
        stored = stored_values(stack)
        if stored is None:
            return None
        scores = torch.empty(stored.values.shape, dtype=torch.float32)
        for piece in self._pieces(stored):
            if piece is None:
                return None
            torch.mul(piece.powers, piece.agreements, out=scores[:, piece.first : piece.first + piece.size])
        return scores

    def merge(self, stack: Stack, tops: Tensor, weights: Sequence[Any], scale: Any) -> Tensor | None:
        """Return the mean ``[*shape]`` of clipped changes, weighted by their scores, times a factor.

        Args:
            stack: the changes.
            tops: the score from which each model's changes compete, and its greatest score, ``[n, 2]``.
            weights: of each model, the factor of its changes.
            scale: the factor of the result.
        """
        stored, shares, factor = stored_values(stack, *weights, scale), numbers_of(*weights), numbers_of(scale)
        if stored is None or shares is None or factor is None:
            return None
        out, work = torch.empty(stored.values.shape[1], dtype=torch.float32), make_workspace(3)
        numbers = self.ends.float(), tops.float(), shares, float(factor)
        for piece in self._pieces(stored):
            if piece is None:
                return None
            scores = piece.powers, piece.agreements, work, out[piece.first : piece.first + piece.size]
            if not run_kernel(
                "competition.merge_competing", stored.values, stored.base, piece.first, *numbers, *scores
            ):
                return None
        return out.view(stored.shape)

    def _pieces(self, stored: StoredValues) -> Iterator[_ScoreFactors | None]:
        """Yield the factors of scores piece by piece, valid until the next one; None where no kernel can do it."""
        n, size = stored.values.shape
        width = min(size, _PIECE)
        powers, agreements = torch.empty(n * width), torch.empty(n * width)
        work = make_workspace(n + 1)
        places, found = torch.empty(n * width // _FEW, dtype=torch.int32), torch.empty(1, dtype=torch.int64)
        for first in range(0, size, max(1, width)):
            count = min(width, size - first)
            piece = _ScoreFactors(first, powers[: n * count].view(n, count), agreements[: n * count].view(n, count))
            results = piece.powers, piece.agreements, TANH_IS_LINEAR, places, found, work
            arguments = stored.values, stored.base, first, self.ends.float(), self.signed, *results
            if not run_kernel("competition.prepare_scores", *arguments):
                yield None
                return
            piece.powers.exp_()
            if int(found) > len(places):
                piece.agreements.tanh_()
            elif int(found):
                large = places[: int(found)].long()
                agreements[large] = agreements[large].tanh_()
            yield piece


@dataclass(frozen=True, slots=True)
class _ScoreFactors:
    """The two factors of the scores of some elements, ``[n, size]`` each, from element ``first`` on."""

    first: int
    powers: Tensor
    agreements: Tensor

    @property
    def size(self) -> int:
        return self.powers.shape[1]
