"""DC-Merge: singular vectors of all tasks with equal energies, without the directions that do not align."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.delta import sum_in_order
from merging.maths.fast_svd import leading_triples, polars
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import CUT
from merging.maths.parameters import Coefficient, Local
from merging.methods.families.spectral import ExactSingular
from merging.methods.ties import agreeing_mean

__all__ = ["DcMerge"]

_STEEPEST = 5.0
"""The largest weight of a direction with ``smooth = linear``, as published."""


class DcMerge(ExactSingular):
    """scale * U M V^T for each matrix: the leading directions of all tasks, with equal energies, in a common space.

    1. Of each of n models' changes take the min(m, k) / n leading singular triples (one at least), as `tsv` does. With
       `smooth = mean` all their singular values become their mean; with `linear` they fall linearly, at most by 5.
    2. U and V are the polar factors of all left and all right singular vectors side by side.
    3. M_i = U^T tau_i V. Only the share `keep` of its entries with the largest magnitudes stays, or as many entries as
       it has directions, if these are more.
    4. M takes the sign of the sum of the M_i, and the mean of the entries with that sign, as in `ties`. Only the blocks
       of M on its diagonal, rows and columns of one model, stay.

    On adapters the entries that stay are mostly those on the diagonal. The result is then `tsv` with equal singular
    values, in which directions that models share are attenuated. Expect a scale of 1.2 to 1.5. Vectors, convolutions
    and embedding tables take scale times the mean.

    Departures from the released code (Tobeginwith/DC-Merge): for full models it does not smooth (`smooth = none`). The
    number of directions bounds the entries that stay from below, without which two adapters of rank 16 would keep one
    entry each. Entries that equal the threshold to 1e-6 stay, and sums of 0 to 1e-6 elect no sign, since rounding
    would choose.

    On adapters it is exact, in the joint spaces of the factors. On full checkpoints it takes n + 2 eigenvalue problems
    of a matrix's shorter side, with one matrix in memory at a time. `svd = fast` takes singular vectors and polar
    factors of large matrices in float32. Entries near the threshold may then stay or go, which moved a merged matrix by
    a hundredth.
    """

    name: ClassVar[str] = "dc_merge"
    summary: ClassVar[str] = "directions of all with equal energies, aligned ones kept"
    paper: ClassVar[str] = "DC-Merge, 2026, arXiv 2603.06242"
    workspace: ClassVar[int] = 8

    scale: Local[Coefficient] = Field(1.2, description="what the merged change is multiplied by (1 to 1.8)")
    smooth: Literal["mean", "linear", "none"] = Field("mean", description="singular values of a model's directions")
    keep: Local[Annotated[float, Field(gt=0, le=1)]] = Field(
        0.001, description="share of each change's entries in the common space that stays"
    )

    def decompositions(self, models: int) -> int:
        return models + 2

    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        found = [leading_triples(change, max(1, size // len(changes)), svd=self.svd) for change in changes]
        us, _, vhs = zip(*found, strict=True)
        left, right = (each.double() for each in polars(us, vhs))
        triples = [[each.double() for each in triple] for triple in found]
        ranks = [len(values) for _, values, _ in triples]
        blocks = [
            self._kept_blocks((left.mT @ u * self._smooth(values)) @ (vh @ right.mT), len(values), ranks)
            for u, values, vh in triples
        ]
        means = list(map(_agreeing_mean, zip(*blocks, strict=True)))
        parts = zip(torch.split(left, ranks, 1), means, torch.split(right, ranks), strict=True)
        return sum_in_order([up @ mean @ down for up, mean, down in parts])

    def _kept_blocks(self, inside: Tensor, rank: int, ranks: Sequence[int]) -> list[Tensor]:
        """Return the blocks on the diagonal, by model, of a change of a rank in the common space, thinned."""
        count = max(1, rank, int(self.keep * inside.numel()))
        if count < inside.numel():
            sizes = inside.abs()
            threshold = sizes.flatten().kthvalue(inside.numel() - count + 1).values
            inside = torch.where(sizes >= threshold * (1 - CUT), inside, 0.0)
        rows = zip(torch.split(inside, list(ranks)), ranks, accumulate(ranks), strict=True)
        return [row[:, stop - size : stop] for row, size, stop in rows]

    def _smooth(self, values: Tensor) -> Tensor:
        """Return the singular values of a model's directions, with the same sum."""
        if self.smooth == "none" or not len(values):
            return values
        steepest = float(values[0] / values[-1]) if self.smooth == "linear" else 1.0
        weights = torch.linspace(min(_STEEPEST, steepest), 1, len(values), dtype=values.dtype, device=values.device)
        return values.sum() * weights / weights.sum()


def _agreeing_mean(blocks: Sequence[Tensor]) -> Tensor:
    """Return the mean of the entries that have the sign of the models' sum; 0 where they cancel out."""
    total, size = sum_in_order(list(blocks)), sum_in_order([block.abs() for block in blocks])
    signs = torch.where(total.abs() > CUT * size, total.sign(), 0.0)
    return agreeing_mean(blocks, signs, [1.0] * len(blocks), normalize=True)
