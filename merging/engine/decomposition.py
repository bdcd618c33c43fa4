"""The decomposition of merged changes, from which the ranks of an adapter are chosen before it is laid out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import fmean

from merging.display.tables import plural
from merging.engine.outputs import Output, Sink, as_matrices
from merging.engine.spool import Spool
from merging.engine.tiles import Tiler
from merging.errors import option
from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.spectra import RankLimits, SingularValues, decompose_change, fit_ranks, is_exact
from merging.plan.items import TILE, Item
from merging.plan.merge_plan import Plan
from merging.plan.rank_settings import RankSettings
from merging.sources.changes import ExtractedChange

__all__ = ["Decomposer", "Decomposition", "is_unchanged", "resize_plan", "settings_of"]

_WIDTH = 64
"""Singular values that are computed at first where conditions decide how many are needed."""


_EXPERTS = re.compile(r"\.experts\.")


@dataclass(slots=True, eq=False)
class Decomposition:
    """The merged changes of a plan, decomposed.

    Attributes:
        plan: the plan, whose ranks are upper bounds.
        spool: the factors, their directions in descending order.
        spectra: the singular values, by tensor.
        statistics: the statistics over the whole model that the method needed.
        unchanged: tensors to be written in full that no model changed.
        notices: remarks for people.
        widths: the numbers of values that are computed, by tensor.
    """

    plan: Plan
    spool: Spool
    spectra: dict[str, SingularValues] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    unchanged: set[str] = field(default_factory=set)
    notices: set[str] = field(default_factory=set)
    widths: dict[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> RankSettings:
        return settings_of(self.plan)

    def widen(self) -> list[Item]:
        """Return the items that need more singular values to fill the budget, and double their numbers."""
        if self.settings.size is None:
            return []
        ranks = self._fit(self.settings.size)
        more = []
        for item in self.plan.items:
            spectrum = self.spectra.get(item.site.name)
            if spectrum is None or spectrum.complete or ranks[item.site.name] < len(spectrum.values):
                continue
            if self.settings.limits.rank(spectrum) is None:
                self.widths[item.site.name] = 2 * len(spectrum.values)
                more.append(item)
        return more

    def choose_ranks(self, budget: int | None = None) -> dict[str, int]:
        """Return the rank of each tensor; ``budget`` is the most bytes for all factors. Tensors of rank 0 go.

        A budget without room for any direction gives the least ranks.
        """
        bounds = self.plan.ranks
        if budget is not None:
            ranks = self._fit(budget)
            if not self.uniform:
                ranks = {name: min(rank, bounds[name]) for name, rank in ranks.items()}
            if not any(ranks.values()):
                return self.least_ranks()
        else:
            limits = self.settings.limits
            ranks = {name: min(limits.rank(each) or 0, bounds[name]) for name, each in self.spectra.items()}
            if self.uniform:
                most = max(ranks.values(), default=0)
                ranks = {name: most if rank else 0 for name, rank in ranks.items()}
        return ranks | self._left_out()

    def least_ranks(self) -> dict[str, int]:
        """Return the ranks of the smallest file: one direction of a single tensor, or of each where ranks are equal.

        Among tensors of the same size it is the direction of most energy.
        """
        costs = _costs(self.plan)
        changed = [name for name, each in self.spectra.items() if each.total]
        if not self.uniform:
            order = {
                name: (costs[name] + 2 * len(name), -self.spectra[name].energy_within(1), name) for name in changed
            }
            changed = sorted(changed, key=lambda name: order[name])[:1]
        return dict.fromkeys(self.spectra, 0) | dict.fromkeys(changed, 1) | self._left_out()

    def bytes_of(self, ranks: Mapping[str, int]) -> int:
        """Return the bytes of factors of these ranks."""
        costs = _costs(self.plan)
        return sum(costs[name] * ranks.get(name, 0) for name in costs)

    @property
    def uniform(self) -> bool:
        """Whether all tensors get one rank."""
        return self.settings.uniform or self._fused

    @property
    def _fused(self) -> bool:
        """Whether PEFT fuses tensors of the output when it loads them, which must be of one rank then."""
        names = (out.name for item in self.plan.items if item.form == "factors" for out in item.outs)
        return self.plan.format == "peft" and any(map(_EXPERTS.search, names))

    def _fit(self, budget: int) -> dict[str, int]:
        costs = _costs(self.plan)
        if not self.uniform:
            return fit_ranks(self.spectra, costs, budget, self.settings.limits)
        changed = {name for name, each in self.spectra.items() if each.total}
        rank = budget // max(1, sum(costs[name] for name in changed))
        limits = self.settings.limits
        needed = max((limits.rank(self.spectra[name]) or rank for name in changed), default=0)
        return {name: min(rank, needed) if name in changed else 0 for name in self.spectra}

    def _left_out(self) -> dict[str, int]:
        """Return rank 0 for unchanged tensors in full, unless another tensor of the module changed."""
        modules: defaultdict[str, set[str]] = defaultdict(set)
        for item in self.plan.items:
            if item.form in ("dense", "delta"):
                modules[item.site.name.rpartition(".")[0]].add(item.site.name)
        return {name: 0 for names in modules.values() if names <= self.unchanged for name in names}

    def losses(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return the share of the energy of each tensor's change that factors of these ranks discard."""
        return {name: each.loss_at(ranks[name]) for name, each in self.spectra.items() if ranks.get(name)}

    def describe(self, ranks: Mapping[str, int]) -> list[str]:
        """Return remarks on tensors that are left out, on the ranks, and on approximate singular values."""
        kept = sorted(rank for name, rank in ranks.items() if rank and name in self.spectra)
        gone = sum(not each.total for each in self.spectra.values()) + len(self._left_out())
        empty = sum(1 for name, each in self.spectra.items() if each.total and not ranks.get(name))
        remarks = sorted(self.notices)
        if gone:
            are = "is" if gone == 1 else "are"
            remarks.append(f"{plural(gone, 'tensor')} that no model changed {are} left out")
        if empty:
            are = "is" if empty == 1 else "are"
            remarks.append(f"{plural(empty, 'tensor')} whose change is too small for the budget {are} left out")
        if self._fused and not self.settings.uniform:
            remarks.append("all tensors have one rank, as PEFT fuses the factors of experts when it loads them")
        if kept and kept[0] != kept[-1]:
            remarks.append(f"ranks from {kept[0]} to {kept[-1]}, {fmean(kept):.1f} on average")
        rough = [each.excess / each.total for each in self.spectra.values() if each.excess]
        if rough:
            were = "was" if len(rough) == 1 else "were"
            remarks.append(
                f"{plural(len(rough), 'change')} {were} decomposed approximately: exact factors keep at most "
                f"{max(rough):.2%} more of the energy of any ({option('exact', True)})"
            )
        return remarks


class Decomposer(Output):
    """Keeps decomposed changes instead of writing them, as many directions as the conditions on ranks need."""

    def __init__(
        self, sink: Sink, tiler: Tiler, discarded: dict[str, float], notices: set[str], *, found: Decomposition
    ) -> None:
        super().__init__(sink, tiler, discarded, notices)
        self.found = found

    def write_factors(self, item: Item, merged: LowRank) -> None:
        """Decompose factors exactly, and keep all directions or as many as conditions need."""
        self._keep(item, merged, False)

    def write_compressed(self, item: Item, full: Tensor) -> None:
        """Decompose a change that is there in full."""
        matrices, transposed = as_matrices(item, full)
        self._keep(item, Dense(matrices), transposed)

    def _keep(self, item: Item, merged: Delta, transposed: bool) -> None:
        name, settings = item.site.name, self.found.settings
        limits, width = settings.limits, self.found.widths.get(name, 0) or _first_width(settings, self.found)
        if settings.size is not None:
            limits = RankLimits(most=width)
        while True:
            decomposed = decompose_change(
                merged, width, exact=settings.exact, shape=item.site.shape, transposed=transposed
            )
            rank = limits.rank(decomposed.spectrum)
            if rank is not None:
                break
            full = decomposed.spectrum.full  # an exact decomposition costs the same for any number of values
            width = full if is_exact(full, width, settings.exact) else 2 * width
        factors, spectrum = decomposed.factors, decomposed.spectrum
        if settings.size is None and not self.found.uniform:
            factors = LowRank(factors.up[..., :rank], factors.down[..., :rank, :], factors.shape, factors.transposed)
        self.found.spectra[name] = spectrum
        self.found.spool.put(name, factors)


def settings_of(plan: Plan) -> RankSettings:
    """Return the conditions on ranks of a plan that has some."""
    settings = plan.recipe.rank
    assert isinstance(settings, RankSettings)
    return settings


def _first_width(settings: RankSettings, found: Decomposition) -> int:
    """Return the number of singular values that is computed at first."""
    conditions = (settings.energy, settings.error, settings.sv_ratio)
    if settings.size is not None:
        fair = ceil(2 * settings.size / max(1, sum(_costs(found.plan).values())))
        return min(max(8, fair), settings.most or fair + 8)
    if all(each is None for each in conditions) and settings.most is not None:
        return settings.most
    return min(_WIDTH, settings.most or _WIDTH)


def _costs(plan: Plan) -> dict[str, int]:
    """Return the bytes that one more direction of each tensor takes in the output."""
    costs = {}
    for item in plan.items:
        if item.form != "factors":
            continue
        terms = item.site.shape[0] if item.site.kind == "experts" and not item.placings else 1
        size = 0
        if not item.placings:
            down, up = item.outs
            size = up.nbytes // max(1, up.shape[1]) + down.nbytes // max(1, down.shape[0])
        for each in item.placings:
            stacked = 1 if each.stack is None else each.up.shape[0]
            size += (each.up.nbytes + (each.down.nbytes if each.down else 0)) // max(1, each.width * stacked)
        costs[item.site.name] = max(1, size * terms)
    return costs


def is_unchanged(item: Item) -> bool:
    """Return whether no model changed a tensor that is to be written in full; whole models' tensors are compared."""
    extracted = [each for each in item.inputs if each is not None]
    if item.base is None or not all(isinstance(each, ExtractedChange) for each in extracted):
        return False
    base = item.base
    for change in extracted:
        assert isinstance(change, ExtractedChange)
        for start in range(0, item.numel, TILE):
            size = min(TILE, item.numel - start)
            ours, theirs = torch.empty(size, dtype=change.value.dtype), torch.empty(size, dtype=base.dtype)
            change.value.read_into(ours, start)
            base.read_into(theirs, start)
            if not torch.equal(ours.to(item.dtype), theirs.to(item.dtype)):
                return False
    return True


def resize_plan(plan: Plan, ranks: Mapping[str, int]) -> Plan:
    """Return the plan with these ranks."""
    assert plan.sized is not None
    return replace(plan.sized(ranks), sources=plan.sources, files=plan.files, stages=plan.stages)
