"""LiNeS: keep the shallow layers close to the base and let the deep ones specialise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from merging.errors import OptionError
from merging.maths.coefficients import number
from merging.maths.delta import Delta, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Coefficient, Local
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.maths.sums import safe_ratio
from merging.methods.contract.method import ResultStatistic, Statistics
from merging.methods.contract.update_rule import UpdateRule
from merging.methods.contract.wrapper import Wrapper
from merging.methods.task_arithmetic import TaskArithmetic

__all__ = ["Lines"]

_NORMS = "lines.norms"
_NU = "lines: nu"


class Lines(Wrapper):
    """Layer-increasing network scaling: multiply the merged change of each tensor by a factor that grows with depth.

    factor = nu * (1/N + beta * depth), for N models, with depth 0 in the first block and 1 in the last, and
    nu = |sum_i w_i tau_i|_1 / |tau_merged|_1 over the whole model, which is 1 for a plain sum. The shallowest block
    then changes as much as in the plain average, whatever the method inside. One model gets 0.5 + 0.5 * depth, the
    paper's setting for it. Each tower of a model counts its own blocks.

    Departures from the paper's code (wang-kee/LiNeS): beta is multiplied by nu, so that it means the same around every
    method (`published` switches this off). Blocks are found by anchored names, never by substring.

    On a shallow encoder LiNeS can be worse than plain task arithmetic. It costs nothing around a sum. Around any other
    method the merge is computed twice, once for nu.
    """

    name: ClassVar[str] = "lines"
    summary: ClassVar[str] = "scale the merged change by depth"
    paper: ClassVar[str] = "LiNeS, Wang et al. 2025, arXiv 2410.17146"
    metric_meanings: ClassVar[Mapping[str, str]] = {
        _NU: "size of the plain sum over size of the merge inside; the scale of each block is a multiple of it"
    }

    beta: Local[Coefficient] = Field(0.5, description="how much the factor grows from the first block to the last")
    alpha: Local[Coefficient] | None = Field(None, description="the factor of the first block, instead of nu/N")
    tail: Literal["alpha", "depth"] = Field(
        "alpha", description="tensors outside the blocks: depth 0 (alpha, as published), or 1 behind the blocks (depth)"
    )
    published: bool = Field(False, description="factor = nu/N + beta * depth, as in the paper's code")

    def check(self, models: int) -> None:
        super().check(models)
        last = self.links()[-1]
        scale = getattr(last, "scale", 1.0)
        if (isinstance(scale, Tensor) or scale != 1) and (self.published or "scale" in last.model_fields_set):
            raise OptionError(
                f"{last.name}.scale must be 1 under lines, which sets the size itself: leave it out, or choose "
                f"lines.alpha and lines.beta"
            )

    @property
    def by_depth(self) -> bool:
        return True

    def result_statistics(self, models: int) -> tuple[ResultStatistic, ...]:
        inner = self.then.result_statistics(models)
        fixed = self.alpha is not None and self.published
        if models == 1 or fixed or self.multiple(models) is not None:
            return inner
        return (*inner, ResultStatistic(_NORMS, Sum(), self._norms))

    def _norms(self, merged: Delta, stack: Stack, site: Site) -> Tensor:
        plain = stack.weighted_sum(self.coefficients(len(stack))).dense()
        return torch.stack([plain.abs().flatten(), merged.dense().abs().flatten()])

    def multiple(self, models: int) -> float | None:
        return self.then.multiple(models)

    def factor(self, site: Site, statistics: Statistics, models: int) -> Coefficient:
        depth = site.position.depth_with_tail if self.tail == "depth" else site.depth
        inner = self.then.factor(site, statistics, models)
        if models == 1:
            return inner * ((0.5 if self.alpha is None else self.alpha) + self.beta * depth)
        nu = self._nu(statistics, models, inner)
        alpha = nu / models if self.alpha is None else self.alpha
        return inner * (alpha + self.beta * depth * (1.0 if self.published else nu))

    def update_rule(self) -> UpdateRule | None:
        """Keep the sum of a method inside that is one, and scale it by depth when the merge is asked for."""
        inner = self.then.update_rule()
        if inner is None or inner.parts != {"sum": TaskArithmetic()}:
            return None
        return UpdateRule(inner.parts, inner.scale, lambda history: self._around_sum(history.models))

    def _around_sum(self, models: int) -> Lines:
        """Return LiNeS parameters with which the sum of all changes, as one model, gives the merge of all models."""
        if models == 1:
            return self.model_copy(update={"then": TaskArithmetic()})
        share = self.multiple(models) or 1.0
        alpha = 1 / models if self.alpha is None else number(self.alpha) * share
        beta = number(self.beta) * (share if self.published else 1.0)
        return Lines(alpha=alpha, beta=beta, tail=self.tail, then=TaskArithmetic())

    def metrics(self, statistics: Statistics, models: int) -> dict[str, float]:
        found = self.then.metrics(statistics, models)
        if models > 1 and _NORMS in statistics:
            found[_NU] = self._nu(statistics, models, self.then.factor(Site("", ()), statistics, models))
        return found

    def _nu(self, statistics: Statistics, models: int, inner: Coefficient) -> float:
        """Return nu; ``inner`` is the factor of the method inside, which is the same at every place."""
        known = self.multiple(models)
        if known is not None:
            return safe_ratio(1.0, abs(known))
        if _NORMS not in statistics:
            return 1.0  # alpha and beta are both given as published, and nu is nowhere in them
        plain, merged = statistics[_NORMS].tolist()
        return safe_ratio(plain, merged * abs(number(inner)))
