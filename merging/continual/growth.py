"""How a merge grows by one model: what is kept of those so far, and how it is published as a merge of all.

What is kept has one or several parts, each a change of the base's tensors; a step makes each part anew from what is
held and the next model's change, by a method that sees the two.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.continual.manifest import Manifest
from merging.errors import OptionError
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.linalg import inner, safe_ratio
from merging.maths.parameters import Coefficient, number, spread
from merging.maths.reductions import Rank, Ranked, Sum
from merging.maths.site import Site
from merging.methods.contract.method import Method, ResultStatistic, Statistic, Statistics
from merging.methods.contract.wrapper import Wrapper
from merging.methods.linear import Linear
from merging.methods.lines import Lines
from merging.methods.magmax import MagMax
from merging.methods.opcm import Opcm
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties, trim

__all__ = ["GROWING", "Step", "check", "parts", "published", "scale_of"]

GROWING = ("opcm", "task_arithmetic", "linear", "magmax", "ties", "lines+task_arithmetic", "lines+linear")
"""The methods, and chains, that a store can grow by."""

_PRODUCTS = "products"
_CUT, _MAJORITY = "cut", "majority"


def check(method: Method) -> None:
    """Raise :class:`~merging.errors.OptionError` for what cannot grow model by model in constant memory."""
    if method.chain not in GROWING:
        raise OptionError(
            f"a store cannot grow by {method.chain}, which must see all models at once: choose one of "
            f"{', '.join(GROWING)}"
        )
    last = method.links()[-1]
    weights = getattr(last, "weights", 1.0)
    if isinstance(weights, (tuple, Tensor)) or number(weights) != 1:
        raise OptionError(f"{last.name}.weights: the models of a store all have the weight 1")
    if any(link.varies for link in method.links()):
        raise OptionError("the parameters of a store's method are the same everywhere: give one value for each")
    if isinstance(last, Linear) and not last.normalize:
        raise OptionError(
            "a store's linear is the mean of its models (normalize): for a sum of changes, task_arithmetic"
        )
    if isinstance(last, Ties) and (last.scope != "model" or isinstance(last.density, tuple)):
        raise OptionError("ties in a store has one density for all models, with scope = model")


def parts(method: Method) -> dict[str, Method]:
    """What is kept, by name, and by what method on (what is held, the next model's change) each part grows."""
    last = method.links()[-1]
    if isinstance(last, Opcm):
        return {"sum": last}
    if isinstance(last, MagMax):
        return {"largest": MagMax()}
    if isinstance(last, Ties):
        (density,) = spread(last.density, 1)
        return {
            name: _Tally(density=density, sign=sign, counts=counts)
            for name, sign, counts in (
                ("positive", 1, False),
                ("negative", -1, False),
                ("positive-counts", 1, True),
                ("negative-counts", -1, True),
            )
        }
    return {"sum": TaskArithmetic()}


def scale_of(method: Method, manifest: Manifest) -> float:
    """What is held is multiplied by this when it is published (before LiNeS and the vote of TIES)."""
    last, norms = method.links()[-1], [step.norm for step in manifest.steps]
    if isinstance(last, Opcm):
        return safe_ratio(sum(norms) / len(norms), manifest.steps[-1].merged) if norms else 1.0
    if isinstance(last, Linear):
        return 1 / max(1, len(norms))
    return number(getattr(last, "scale", 1.0))


def published(method: Method, manifest: Manifest) -> Method:
    """The method that makes the merge of all models of what is kept of them."""
    outer, last = method.links()[0], method.links()[-1]
    if isinstance(last, Ties):
        return _Elected(scale=number(last.scale), zero=last.zero, normalize=last.normalize)
    if isinstance(outer, Lines):
        return _by_depth(outer, len(manifest.steps))
    return TaskArithmetic(scale=scale_of(method, manifest))


def _by_depth(lines: Lines, models: int) -> Method:
    """LiNeS as it is around all models at once, around their sum: what it multiplies their mean or sum by, times what
    that is of the sum."""
    if models == 1:
        return lines.model_copy(update={"then": TaskArithmetic()})
    share = lines.multiple(models) or 1.0
    alpha = 1 / models if lines.alpha is None else number(lines.alpha) * share
    beta = number(lines.beta) * (share if lines.published else 1.0)
    return Lines(alpha=alpha, beta=beta, tail=lines.tail, then=TaskArithmetic())


class Step(Wrapper):
    """One step of a part: the method inside on (what is held, the next change), without the factor of a merge.

    Tells the inner products of what was held, the next change, and what is held then.
    """

    name: ClassVar[str] = "step"
    summary: ClassVar[str] = "one step of a merge that grows"

    @property
    def rescales(self) -> bool:
        return False

    def result_statistics(self, models: int) -> tuple[ResultStatistic, ...]:
        return (ResultStatistic(_PRODUCTS, Sum(), _products, grain="matrix"),)

    def factor(self, site: Site, statistics: Statistics, models: int) -> Coefficient:
        return 1.0

    def metrics(self, statistics: Statistics, models: int) -> dict[str, float]:
        names = ("held.held", "held.next", "next.next", "held.merged", "next.merged", "merged.merged")
        return dict(zip(names, statistics[_PRODUCTS].tolist(), strict=True))


def _products(merged: Delta, stack: Stack, site: Site) -> Tensor:
    """The inner products of (held, next, merged) with each other, ``[6, 1]`` float64."""
    held, following = stack.deltas
    pairs = ((held, held), (held, following), (following, following), *((each, merged) for each in stack.deltas))
    return torch.stack([_product(*pair) for pair in (*pairs, (merged, merged))])[:, None]


def _product(one: Delta, other: Delta) -> Tensor:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return inner(one, other)
    pieces = zip(*(torch.split(each.dense().reshape(-1), 1 << 20) for each in (one, other)), strict=True)
    return torch.stack(
        [(a * b).sum(dtype=torch.float64) for a, b in pieces] or [torch.zeros((), dtype=torch.float64)]
    ).sum()


class _Tally(Method):
    """What is held, plus the next change where it is large and of one sign, or the number 1 there."""

    name: ClassVar[str] = "tally"
    summary: ClassVar[str] = "sum, or number, of trimmed changes of one sign"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    density: float
    sign: Literal[1, -1]
    counts: bool

    def required_statistics(self) -> tuple[Statistic, ...]:
        if self.density >= 1:
            return ()
        ranks = Ranked((Rank.largest(self.density),), magnitudes=True)
        return (Statistic(_CUT, ranks, lambda stack, site, statistics: stack.dense()[1:]),)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        held, following = stack.dense()
        trimmed = following if self.density >= 1 else trim(following, float(statistics[_CUT][0, 0]))
        agreeing = torch.relu(trimmed * self.sign)
        added = torch.gt(agreeing, 0, out=torch.empty_like(agreeing)) if self.counts else agreeing
        return Dense(held + added)


class _Elected(Method):
    """TIES of what was tallied: the mean, or the sum, on the side of each entry that weighs more."""

    name: ClassVar[str] = "elected"
    summary: ClassVar[str] = "TIES of tallied changes"
    models: ClassVar[tuple[int, int | None]] = (4, 4)

    scale: float
    zero: Literal["majority", "plus"]
    normalize: bool

    def required_statistics(self) -> tuple[Statistic, ...]:
        majority = Statistic(_MAJORITY, Sum(), lambda stack, site, statistics: _sign(stack)[None])
        return (majority,) if self.zero == "majority" else ()

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        positive, negative, ups, downs = stack.dense()
        otherwise = -1.0 if self.zero == "majority" and float(statistics[_MAJORITY]) < 0 else 1.0
        signs = _sign(stack)
        signs = torch.where(signs == 0, otherwise, signs)
        if self.normalize:
            positive, negative = positive / ups.clamp(min=1), negative / downs.clamp(min=1)
        return Dense(torch.where(signs > 0, positive, -negative) * self.scale)


def _sign(stack: Stack) -> Tensor:
    return torch.sign(stack.dense()[0] - stack.dense()[1])
