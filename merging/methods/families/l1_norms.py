"""The L1 norms of changes before and after entries are dropped, by which the kept entries make up for the rest."""

from __future__ import annotations

from collections.abc import Callable

from merging.maths.delta import Stack
from merging.maths.kernels.drop_steps import sum_spans
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.maths.sums import safe_ratio, spans
from merging.methods.contract.method import Statistic, Statistics

__all__ = ["l1_ratios", "l1_statistic"]


def l1_statistic(name: str, thin: Callable[[Stack, Site, Statistics], Tensor]) -> Statistic:
    """Return the statistic of the L1 norms of each change in a tensor, whole and without dropped entries.

    Args:
        name: its name, for :func:`l1_ratios`.
        thin: returns the changes ``[n, *shape]`` with dropped entries 0.
    """

    def norms(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
        """Return parts of the norms before and after dropping, ``[2 n, parts]``."""
        return torch.cat([_span_norms(stack), _span_norms(Stack.of(thin(stack, site, statistics)))])

    return Statistic(name, Sum(), norms, per="tensor")


def _span_norms(stack: Stack) -> Tensor:
    """Return the L1 norms of parts of each change, ``[n, parts]``."""
    sums = sum_spans(stack)
    if sums is not None:
        return sums
    whole, rest = spans(stack.dense().abs())
    return torch.cat([whole.sum(-1), rest.sum(-1, keepdim=True)], 1)


def l1_ratios(statistics: Statistics, name: str) -> list[float]:
    """Return the number for each model by which what is kept of its change has the norm of the whole."""
    before, after = statistics[name].view(2, -1).tolist()
    return [safe_ratio(b, a) for b, a in zip(before, after, strict=True)]
