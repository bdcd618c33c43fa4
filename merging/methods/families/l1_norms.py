"""The L1 norms of changes before and after entries are dropped, by which the kept entries make up for the rest."""

from __future__ import annotations

from collections.abc import Callable

from merging.maths.delta import Stack
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
        both = [spans(each.abs()) for each in (stack.dense(), thin(stack, site, statistics))]
        return torch.cat([torch.cat([whole.sum(-1), rest.sum(-1, keepdim=True)], 1) for whole, rest in both])

    return Statistic(name, Sum(), norms, per="tensor")


def l1_ratios(statistics: Statistics, name: str) -> list[float]:
    """Return the number for each model by which what is kept of its change has the norm of the whole."""
    before, after = statistics[name].view(2, -1).tolist()
    return [safe_ratio(b, a) for b, a in zip(before, after, strict=True)]
