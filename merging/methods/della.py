"""DELLA: drop small changes more often than large ones, at random, before any method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from merging.errors import OptionError
from merging.maths import order_statistics
from merging.maths.bits import pack_bits
from merging.maths.coefficients import number, spread
from merging.maths.delta import Stack
from merging.maths.kernels.drop_steps import Ranking, drop_by_rank, keep_marked
from merging.maths.kernels.steps import stored_values
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import PerModel
from merging.maths.randomness import draw_uniform
from merging.maths.site import Site
from merging.methods.contract.method import Grain
from merging.methods.families.dropping import Dropping

__all__ = ["Della", "probabilities"]


class Della(Dropping):
    """MAGPRUNE: keep each entry of a row with a probability that grows with the rank of its magnitude.

    The smallest entry of a row is kept with probability density - epsilon, the largest with density + epsilon, and
    entries between them in even steps. Rows are as in memory, a vector is one row, and equal magnitudes rank by
    position. A density of 1 keeps every entry and a density of 0 none, whatever epsilon (as in mergekit; the paper has
    no such cases). Kept
    entries are divided by their own probability, which keeps the expectation (`rescale = inverse`, the paper), or
    multiplied so that each tensor keeps its L1 norm (`l1`), or left as they are (`none`). The kept entries follow from
    the seed, the content of the model, the name of the tensor and the position, but not from the order of models or
    tensors, the shards, or the device. On adapters the merged change has full rank. Each row is sorted, or
    counted by a compiled kernel, in each sweep of the method inside.
    """

    name: ClassVar[str] = "della"
    summary: ClassVar[str] = "drop small changes more often than large ones"
    paper: ClassVar[str] = "DELLA-Merging, Deep et al. 2024, arXiv 2406.11617"
    workspace: ClassVar[int] = 9

    density: PerModel[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.7, description="share of each model's change that is kept on average; one for all, or one each"
    )
    epsilon: PerModel[Annotated[float, Field(ge=0, lt=1)]] = Field(
        0.15, description="how far probabilities are from the density; one for all, or one each"
    )

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if self.then.grain_at(site) == "matrix" else "row"

    def idle(self, site: Site) -> Mapping[str, str]:
        everything = all(density == 1 for density in spread(self.density, 1))
        return dict.fromkeys(("epsilon", "seed"), "a density of 1 keeps everything") if everything else {}

    def check(self, models: int) -> None:
        super().check(models)
        if self.varies:
            return
        for density, epsilon in zip(spread(self.density, models), spread(self.epsilon, models), strict=True):
            if 0 < number(density) < 1 and not number(epsilon) < number(density) <= 1 - number(epsilon):
                raise OptionError(
                    f"della.density = {density:g} and della.epsilon = {epsilon:g}: probabilities run from density - "
                    f"epsilon, above 0, to density + epsilon, at most 1: choose a smaller epsilon"
                )

    def thin(self, stack: Stack, site: Site, divide: bool) -> Tensor:
        densities, epsilons = spread(self.density, len(stack)), spread(self.epsilon, len(stack))
        if not divide and all(0 < density < 1 for density in densities):
            dropped = self._drop_by_kernel(stack, site, list(zip(densities, epsilons, strict=True)))
            if dropped is not None:
                return dropped
        values = stack.dense()
        out = torch.empty_like(values)
        for slot, (value, density, epsilon, into) in enumerate(zip(values, densities, epsilons, out, strict=True)):
            if divide and density:
                keep = probabilities(value.reshape(-1, site.row), density, epsilon).view(value.shape)
                torch.mul(value, self._draw(stack, slot, site, keep), out=into).div_(keep)
                continue

            def draw(
                slot: int = slot, value: Tensor = value, density: float = density, epsilon: float = epsilon
            ) -> Tensor:
                keep = probabilities(value.reshape(-1, site.row), density, epsilon).view(value.shape)
                return self._draw(stack, slot, site, keep)

            torch.mul(value, self.kept_mask(stack, slot, draw), out=into)
        return out

    def _drop_by_kernel(self, stack: Stack, site: Site, chances: list[tuple[float, float]]) -> Tensor | None:
        """Return the changes ``[n, *shape]``, 0 where they are dropped; None where no kernel can do it.

        ``chances`` are the density and the epsilon of each model.
        """
        stored = stored_values(stack)
        if stored is None:
            return None
        out = torch.empty(stored.values.shape, dtype=torch.float32)
        for slot, (density, epsilon) in enumerate(chances):
            key, into = (self.name, id(self), slot), out[slot]
            if stack.memo is not None and key in stack.memo:
                if not keep_marked(stack, slot, stack.memo[key], into):
                    return None
                continue
            steps = _rank_probabilities(site.row, density, epsilon).float()
            drop = drop_by_rank(stack, slot, site, Ranking(steps, self.seed), into)
            if drop is None:
                return None
            if len(drop.left):
                rows, drawn = drop.changes[drop.left], self._uniform(stack, slot, site, drop.marks)[drop.left]
                marks = torch.lt(drawn, probabilities(rows, density, epsilon))
                drop.changes[drop.left], drop.marks[drop.left] = rows * marks, marks.to(torch.uint8)
            if stack.memo is not None:
                stack.memo[key] = pack_bits(drop.marks)
        return out.view(len(out), *stored.shape)

    def _uniform(self, stack: Stack, slot: int, site: Site, like: Tensor) -> Tensor:
        """Return the draws of a model's entries, of the shape of ``like``."""
        place = self.seed, stack.models[slot], site.name
        return draw_uniform(site.start, like.numel(), like.device, *place).view(like.shape)

    def _draw(self, stack: Stack, slot: int, site: Site, keep: Tensor) -> Tensor:
        """Return a mask that keeps each entry of a model with its probability ``keep [*shape]``."""
        drawn = self._uniform(stack, slot, site, keep)
        return torch.lt(drawn, keep, out=torch.empty_like(keep))


def probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability ``[rows, columns]`` of keeping each entry, in the type of the rows."""
    if density in (0, 1):
        return torch.full_like(rows, density)
    steps = _rank_probabilities(rows.shape[1], density, epsilon, rows.device).to(rows.dtype)
    return torch.empty_like(rows).scatter_(1, _ascending(rows), steps.expand(rows.shape))


def _rank_probabilities(columns: int, density: float, epsilon: float, device: torch.device | None = None) -> Tensor:
    """Return the probability of keeping an entry of a row, by rank, ``[columns]`` float64."""
    steps = torch.linspace(density - epsilon, density + epsilon, columns, dtype=torch.float64, device=device)
    # a row of one entry ranks neither low nor high
    return steps if columns > 1 else torch.full_like(steps, density)


def _ascending(rows: Tensor) -> Tensor:
    """Return the columns of each row by rising magnitude, equal ones by position, int64."""
    keys = order_statistics.keys(rows.detach().contiguous(), magnitudes=True)
    if keys.dtype == torch.int64:
        return torch.sort(keys, dim=1, stable=True).indices
    # magnitude and column in one number: plain sorting is several times faster than sorting indices
    packed = (keys.long() << 32).add_(torch.arange(rows.shape[1], device=rows.device))
    if rows.device.type == "cpu":
        packed.numpy().sort(axis=1)
    else:
        packed = packed.sort(1).values
    return packed.bitwise_and_(0xFFFFFFFF)
