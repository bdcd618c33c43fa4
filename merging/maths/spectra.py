"""Singular values of changes, and the ranks chosen from them: by energy, ratio, error, or a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merging.display.tables import Displayed
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor
from merging.maths.linalg import (
    CUT,
    decompose,
    decompose_each,
    factored_svd,
    find_range,
    residual_norm,
    sum_squares,
)

__all__ = ["Decomposed", "RankLimits", "SingularValues", "decompose_change", "fit_ranks", "is_exact"]

_DIRECT = 256
"""Matrices with at most this many rows or columns are decomposed exactly."""

_SHARE = 4
"""A randomised decomposition is quicker up to about this part of the shorter side (measured on two cores)."""


@dataclass(frozen=True, slots=True, repr=False)
class SingularValues(Displayed):
    """Leading singular values of the change of one tensor; of experts, the root of the sum of their squares.

    Attributes:
        values: the values that were computed, in descending order.
        total: the squared Frobenius norm of the change.
        full: the number of singular values that the change has at most.
        excess: an estimate of the energy that the best factors of any rank keep in addition; 0 where values are exact.
    """

    values: tuple[float, ...]
    total: float
    full: int
    excess: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether all values were computed."""
        return len(self.values) >= self.full

    def energy_within(self, rank: int) -> float:
        """Return the energy that factors of a rank keep."""
        return sum(value * value for value in self.values[:rank])

    def loss_at(self, rank: int) -> float:
        """Return the share of the energy that factors of a rank lose."""
        return max(0.0, 1 - self.energy_within(rank) / self.total) if self.total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLimits:
    """Conditions on the rank of a change; all hold.

    Attributes:
        most: the largest rank.
        energy: the share of the energy that is kept at least, up to 1.
        error: the largest relative error, in the Frobenius norm.
        sv_ratio: the largest ratio of the first singular value to any that is kept.
    """

    most: int | None = None
    energy: float | None = None
    error: float | None = None
    sv_ratio: float | None = None

    def rank(self, spectrum: SingularValues) -> int | None:
        """Return the rank of a change, 0 for a change of zero; None where more singular values have to be known."""
        first = spectrum.values[0] if spectrum.values else 0.0
        if not first:
            return 0
        floor = max(first * CUT, first / self.sv_ratio if self.sv_ratio else 0.0)
        above = sum(value >= floor * (1 - 1e-12) for value in spectrum.values)
        known = above < len(spectrum.values) or spectrum.complete
        rank = above
        wanted = max(self.energy or 0.0, 0.0 if self.error is None else 1 - self.error**2)
        if 0 < wanted < 1:
            kept, target = 0.0, wanted * spectrum.total * (1 - 1e-9)
            for count, value in enumerate(spectrum.values[:above], 1):
                kept += value * value
                if kept >= target:
                    rank, known = count, True
                    break
        if self.most is not None and (rank >= self.most or len(spectrum.values) >= self.most):
            return min(rank, self.most)
        return rank if known else None


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """The singular values of a change, and its factors, with the values split evenly between them, in their order."""

    factors: LowRank
    spectrum: SingularValues


def decompose_change(
    delta: Delta,
    width: int | None = None,
    *,
    exact: bool = False,
    shape: tuple[int, ...] = (),
    transposed: bool = False,
) -> Decomposed:
    """Return the leading singular values and factors of a change.

    Factors are decomposed exactly, through their QR. A full matrix is decomposed by subspace iteration where few values
    are wanted of many, and exactly in float64 otherwise.

    Args:
        delta: the change; a full one as matrices ``[out, in]`` or ``[experts, out, in]``.
        width: the number of values wanted, all by default.
        exact: whether full matrices are always decomposed exactly.
        shape: the shape of the base's tensor that a full change belongs to.
        transposed: whether the product of factors is the transpose of that tensor.
    """
    if isinstance(delta, LowRank):
        u, s, vh = factored_svd(delta.up, delta.down)
        full, total, excess = min(delta.up.shape[-2], delta.down.shape[-1], delta.rank), float(s.square().sum()), 0.0
        dtype, shape, transposed = delta.up.dtype, delta.shape, delta.transposed
    else:
        matrix = delta.dense()
        full, dtype = min(matrix.shape[-2:]), matrix.dtype
        total = sum_squares(matrix)
        width = full if width is None else min(width, full)
        excess = 0.0
        if is_exact(full, width, exact):
            u, s, vh = _exact(matrix, width)
        else:
            basis = find_range(matrix, width)
            inner = basis.mT @ matrix
            u, s, vh = factored_svd(basis, inner)
            rest = max(0.0, total - float(s.square().sum()))
            excess = min(rest, width * residual_norm(matrix, basis, inner) ** 2)
    width = s.shape[-1] if width is None else min(width, s.shape[-1])
    u, s, vh = u[..., :width], s[..., :width], vh[..., :width, :]
    root = s.sqrt()
    factors = LowRank((u * root[..., None, :]).to(dtype), (root[..., None] * vh).to(dtype), shape, transposed)
    squares = s.square().reshape(-1, s.shape[-1]).sum(0)
    return Decomposed(factors, SingularValues(tuple(squares.sqrt().tolist()), total, full, excess))


def is_exact(full: int, width: int, exact: bool = False) -> bool:
    """Return whether matrices with ``full`` singular values are decomposed exactly for ``width`` of them."""
    return exact or full <= _DIRECT or width * _SHARE > full


def _exact(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values of a matrix, or of a batch of them, in float64."""
    return decompose(matrix.double(), needed=width) if matrix.dim() == 2 else decompose_each(matrix, width)


def fit_ranks(
    spectra: Mapping[str, SingularValues], costs: Mapping[str, int], budget: int, limits: RankLimits
) -> dict[str, int]:
    """Return the ranks at which factors of all tensors take at most ``budget`` bytes and keep the most energy.

    Directions of all tensors are taken in the order of their energy for each byte. As the values of each tensor
    decrease, this is the optimum up to the last direction.

    Args:
        spectra: the singular values of each tensor's change.
        costs: the bytes that one direction of each tensor takes.
        budget: the bytes for all.
        limits: further limits on each rank.
    """
    ends = {name: limits.rank(each) for name, each in spectra.items()}
    directions = []
    for name, each in spectra.items():
        end = ends[name]
        for place, value in enumerate(each.values[:end]):  # None takes all
            directions.append((-value * value / costs[name], name, place))
    ranks = dict.fromkeys(spectra, 0)
    for _, name, place in sorted(directions):
        if costs[name] <= budget and ranks[name] == place:
            budget -= costs[name]
            ranks[name] += 1
    return ranks
