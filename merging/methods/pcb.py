"""PCB: weigh every parameter of every model by how large it is in it and how well it agrees with the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.errors import OptionError
from merging.maths.coefficients import column
from merging.maths.delta import Delta, Dense, Stack, sum_in_order
from merging.maths.kernels.competition_steps import TANH_IS_LINEAR, Competition
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.order_statistics import Rank
from merging.maths.parameters import Coefficient, Local, PerModel, varies
from merging.maths.radix_selection import OrderStatistics
from merging.maths.reductions import Sum, column_pieces
from merging.maths.site import Site
from merging.maths.stored_values import StoredValues
from merging.methods.contract.method import Method, Statistic, Statistics, stored_changes

__all__ = ["Pcb", "clip_tails", "competition", "minmax"]

_PIECE = 1 << 17
"""Entries of each model that are merged at once on a CPU."""

_FEW = 1 / 16
"""The share of numbers up to which it is faster to compute them one by one."""

_CLIP, _EXTREMES, _MASSES, _CUT = "pcb.clip", "pcb.extremes", "pcb.masses", "pcb.cut"


class Pcb(Method):
    """Parameter competition balancing: a weighted mean whose weights compete within each model and across models.

    With tau_i over the whole model, a_i = |tau_i| clipped at both tails by the share `clip`, c_i = sign(tau_i) a_i,
    u_i = minmax(a_i), s_i = sign(tau_i) u_i and n models, the released code (duguodong7/pcb-merging) computes

        beta_i = exp(n u_i^2) * tanh(tau_i * sum_j tau_j)        size within the model, agreement across models
        S_i    = minmax(beta_i) above the largest `ratio` of beta_i, and 0 below
        tau    = scale * sum_i w_i c_i S_i / sum_i S_i

    `variant = vision` has tanh(tau_i * sum_j s_j) and `es` sum_j tanh(s_i * s_j), as the code's other files do;
    `paper` is what the paper prints, with softmaxes for exp and tanh, no clip, and the surviving beta_i as weights.
    Published vision numbers come from `vision` with ratio 0.05, clip 0.01 and scale 1.2.

    A model whose changes are all zero or all of one size competes with 0 or 1 instead of NaN. Parameters that training
    never touches shift all thresholds: leave them out with `exclude`. As a mean, it needs a scale of 1 to 2. Most
    parameters stay as in the base, and all of them if there are fewer than 1/ratio, as the last to compete has no
    weight. On adapters the merged change has full rank. From 40 models on, exp(n u^2) is computed as exp(n (u^2 - 1)),
    which changes nothing but the overflow.

    All statistics are exact, over the whole model (or over each tensor, which is another method than the paper's), in
    constant memory. They take two samples and two sweeps over the inputs before the merge, or three for `paper`, whose
    memory grows with the square of the number of models.
    """

    name: ClassVar[str] = "pcb"
    summary: ClassVar[str] = "weigh parameters by size and agreement with the others"
    paper: ClassVar[str] = "PCB-Merging, Du et al. 2024, arXiv 2410.02396"
    workspace: ClassVar[int] = 24

    ratio: Local[Annotated[float, Field(gt=0, le=1)]] = Field(
        0.1, description="share of each model's parameters that compete"
    )
    clip: Local[Annotated[float, Field(ge=0, lt=0.5)]] = Field(
        0.01, description="share of magnitudes that is clipped at either end"
    )
    scale: Local[Coefficient] = Field(1.2, description="what the weighted mean is multiplied by")
    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; may be negative")
    variant: Literal["code", "vision", "es", "paper"] = Field("code", description="which of the published forms")
    scope: Literal["model", "tensor"] = Field("model", description="what statistics are taken over")

    def check(self, models: int) -> None:
        super().check(models)
        shares = [field for field in ("ratio", "clip") if varies(getattr(self, field))]
        if self.scope == "model" and shares:
            raise OptionError(
                f"pcb.{shares[0]} is a share of the whole model, so it cannot differ from place to place: use scope = "
                f"tensor, or one {shares[0]}"
            )

    def required_statistics(self) -> tuple[Statistic, ...]:
        if varies(self.ratio) or varies(self.clip):
            return ()
        cut = OrderStatistics((Rank.share(1 - self.ratio), Rank.upper(0)))
        if self.variant == "paper":
            ends = OrderStatistics((Rank.share(0), Rank.upper(0)))
            return (
                Statistic(_EXTREMES, ends, lambda stack, site, statistics: _products(stack.dense()), per=self.scope),
                Statistic(_MASSES, Sum(), self._exponentials, per=self.scope),
                Statistic(_CUT, cut, self._scores, per=self.scope),
            )
        clip = OrderStatistics((Rank.share(self.clip), Rank.upper(self.clip)), magnitudes=True)
        return (
            Statistic(_CLIP, clip, stored_changes, per=self.scope),
            Statistic(_CUT, cut, self._scores, per=self.scope),
        )

    def _exponentials(self, stack: Stack, site: Site, statistics: Statistics) -> Tensor:
        """Return the terms of the softmaxes' sums: n of the models alone, then those for all pairs of models."""
        return _exponentials(stack.dense(), statistics)

    def _scores(self, stack: Stack, site: Site, statistics: Statistics) -> Tensor | StoredValues:
        """Return beta ``[n, elements]``."""
        competition = self._competition(statistics)
        scores = competition.score(stack) if competition is not None else None
        if scores is not None:
            return StoredValues(scores, None, tuple(scores.shape[1:]), lambda: scores)
        return torch.cat([self._compete(piece, statistics) for piece in _pieces(stack.dense())], 1)

    def _competition(self, statistics: Statistics) -> Competition | None:
        """Return the competition that kernels compute; None where sums of tanh or softmaxes are asked for."""
        return Competition(statistics[_CLIP], self.variant == "vision") if self.variant in ("code", "vision") else None

    def _compete(self, values: Tensor, statistics: Statistics) -> Tensor:
        """Return beta of some entries ``[n, elements]``."""
        if self.variant != "paper":
            return competition(values, statistics[_CLIP], self.variant)
        n = len(values)
        shares = _exponentials(values, statistics)
        shares = shares / column(statistics[_MASSES], shares)
        return torch.stack([shares[i] * sum(shares[n + _pair(i, j, n)] for j in range(n)) for i in range(n)])

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        competition = self._competition(statistics)
        if competition is not None:
            weights = self.coefficients(len(stack))
            found = competition.merge(stack, statistics[_CUT], weights, self.scale)
            if found is not None:
                return Dense(found)
        values = stack.dense()
        merged = [self._merge_entries(piece, statistics) for piece in _pieces(values)]
        return Dense(torch.cat(merged).view(values.shape[1:]) * self.scale)

    def _merge_entries(self, values: Tensor, statistics: Statistics) -> Tensor:
        """Return the weighted mean of some entries ``[n, elements]``."""
        scores = self._compete(values, statistics)
        cut, most = column(statistics[_CUT][:, 0], scores), statistics[_CUT]
        if self.variant == "paper":
            shares, sizes = scores * (scores >= cut), values
            mass = sum_in_order(shares)
            mass += mass == 0
        else:
            shares, sizes = minmax(torch.maximum(scores, cut), most), clip_tails(values, statistics[_CLIP])
            mass = sum_in_order(shares).clamp(min=1e-12)
        if isinstance(self.weights, Tensor) or self.weights != 1:
            sizes = sizes * column(self.weights, values)
        return sum_in_order(sizes * shares) / mass


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """Yield values ``[n, *shape]`` in pieces ``[n, elements]``, so small that temporary results stay in the cache."""
    rows = values.reshape(len(values), -1)
    return column_pieces(rows, _PIECE) if rows.shape[1] else iter([rows])


def clip_tails(values: Tensor, ends: Tensor) -> Tensor:
    """Return values ``[n, *shape]`` with magnitudes clipped to each model's ``ends [n, 2]``; zeros stay zeros."""
    sizes = _clamp(values, ends)
    return sizes.mul_(values.sign())


def minmax(values: Tensor, ends: Tensor) -> Tensor:
    """Return values ``[n, *shape]`` mapped from each model's ``ends [n, 2]`` to [0, 1]; 0 where the ends are equal.

    They take the place of the values.
    """
    for value, (low, high) in zip(values, ends.to(values), strict=True):
        value.sub_(low).div_(torch.where(high > low, high - low, torch.inf))
    return values


def tanh(values: Tensor) -> Tensor:
    """Return tanh of values, which it takes the place of.

    Where it is the float32 number itself, it is not computed, which mostly saves nearly all of its time: products of
    changes are tiny.
    """
    if values.dtype != torch.float32 or not values.numel():
        return values.tanh_()
    low, high = torch.aminmax(values)
    if max(-float(low), float(high)) <= TANH_IS_LINEAR:
        return values
    flat = values.view(-1)
    large = (flat.abs() > TANH_IS_LINEAR).nonzero().view(-1)
    if len(large) > _FEW * len(flat):
        return values.tanh_()
    flat[large] = flat[large].tanh_()
    return values


def competition(values: Tensor, ends: Tensor, variant: str) -> Tensor:
    """Return beta ``[n, *shape]``, how each model's change competes at each entry, from the ends of its magnitudes."""
    n = len(values)
    sizes = minmax(_clamp(values, ends), ends)
    if variant == "code":
        inter = tanh(values * sum_in_order(values))
    else:
        signed = values.sign().mul_(sizes)
        if variant == "vision":
            inter = tanh(values * sum_in_order(signed))
        else:
            inter = sum((tanh(signed * other) for other in signed[1:]), tanh(signed * signed[0]))
    squares = sizes.square_()
    return (squares.sub_(1) if n >= 40 else squares).mul_(n).exp_().mul_(inter)


def _clamp(values: Tensor, ends: Tensor) -> Tensor:
    """Return clipped magnitudes. Clipping to numbers takes a seventh of the time of clipping to tensors."""
    out = values.abs()
    for value, (low, high) in zip(out, ends.tolist(), strict=True):
        value.clamp_(low, high)
    return out


def _exponentials(values: Tensor, statistics: Statistics) -> Tensor:
    norms = minmax(_products(values), statistics[_EXTREMES])
    alone = norms[[_pair(i, i, len(values)) for i in range(len(values))]]
    return torch.cat([(alone * len(values)).exp(), norms.exp()])


def _products(values: Tensor) -> Tensor:
    """Return tau_i * tau_j of all pairs i <= j, ``[n (n + 1) / 2, *shape]``."""
    return torch.cat([values[i] * values[i:] for i in range(len(values))])


def _pair(one: int, other: int, n: int) -> int:
    """Return the position of a pair among :func:`_products`."""
    i, j = min(one, other), max(one, other)
    return i * n - i * (i - 1) // 2 + j - i
