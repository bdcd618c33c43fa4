"""Fisher merging: the mean of the changes, each number weighted by its importance to the model."""

from __future__ import annotations

from typing import ClassVar

from merging.maths.delta import Delta, Dense, Stack
from merging.maths.lazy_torch import torch
from merging.maths.site import Site
from merging.methods.contract.method import Statistics, StatisticsKind
from merging.methods.families.from_examples import FromExamples

__all__ = ["Fisher"]

_FLOOR = 1e-6
"""Added to each importance, as a share of the root mean square over the model: unused numbers take the mean."""


class Fisher(FromExamples):
    """scale * sum_i w_i F_i tau_i / sum_i w_i F_i for each number, with F_i the diagonal of the Fisher information.

    F_i is the mean over examples of the squared gradients of log p(y | x), with y drawn from model i's own predictions,
    or with the labels: `merge stats --fisher` gathers it in a file for each model (`--stats`). F_i is divided by its
    root mean square over the whole model, so that all models count alike. A millionth of that is added, so that a
    number that no example touches takes the mean.

    Departures from the released code (mmatena/model_merging): the size of F_i is normalized as in its option, by
    default; embeddings and output heads are merged by it too. The
    function for Fisher merging of RegMean's authors gives the same on random changes (within 2e-16).

    Adapters are written out, as the result is not low-rank. It reads half as many bytes again as the models have.
    """

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "mean weighted by Fisher information from examples"
    paper: ClassVar[str] = "Merging Models with Fisher-Weighted Averaging, Matena, Raffel 2022, arXiv 2111.09832"
    needs_statistics: ClassVar[StatisticsKind | None] = "fisher"
    workspace: ClassVar[int] = 6

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        self.require_statistics(stack)
        values = stack.dense()
        count = values[0].numel()
        found = [each.read_fisher(site.start, count) if each else None for each in stack.layer_statistics]
        known = [fisher for fisher in found if fisher is not None]
        if len(known) < len(stack):
            return self.mean(stack)
        importance = torch.stack([fisher.to(values) + _FLOOR for fisher in known]).view(values.shape)
        weights = torch.tensor(self.coefficients(len(stack)), dtype=values.dtype, device=values.device)
        importance *= weights.view(-1, *[1] * (values.dim() - 1))
        merged = (importance * values).sum(0) / importance.sum(0)
        return Dense(merged).scaled(self.scale)
