"""LoraHub: one weight an adapter, searched without gradients (Huang et al. 2023, arXiv 2307.13269)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch

from merging.recycling.experts import Expert
from merging.recycling.journal import Journal
from merging.recycling.problem import Mixed, Problem

__all__ = ["searched"]

_BOUND, _L1, _EVALUATIONS, _REACH = 1.5, 0.05, 100, 0.5
_NOWHERE = 1e9
"""What stands for a loss that is no number."""


def searched(problem: Problem, experts: Sequence[Expert], journal: Journal, stage: str, target: int | None) -> Mixed:
    """The weights within 1.5 of zero with the lowest training loss plus 0.05 times their mean size.

    Departs from the paper in three points: changes are added, not factors, whose products across adapters mean
    nothing; the search starts at the target LoRA (weight 1, ``target``) where there is one, since searches from zero
    were found not to reach it; and COBYQA (Ragonneau and Zhang 2024) takes the place of Nevergrad's choice.
    """
    import numpy as np
    from scipy.optimize import Bounds, minimize

    settings, model = problem.settings, problem.model
    l1 = _L1 if settings.l1 is None else settings.l1
    mixture = problem.mixture(experts, "expert", "linear")
    owner = mixture.layout.experts
    kept: list[float] = journal.get(stage) or []
    known = len(kept)
    tried: list[Any] = []

    def objective(weights: Any) -> float:
        """The value at some weights; a run that goes on is told the values that it found before."""
        if len(tried) == len(kept):
            with mixture.at(torch.tensor(weights, dtype=torch.float32)[owner]):
                loss = model.scores(problem.learn).loss
            kept.append(loss + l1 * float(np.abs(weights).mean()) if isfinite(loss) else _NOWHERE)
            if len(kept) % settings.every == 0:
                journal.keep(stage, kept)
        tried.append(np.array(weights))
        return kept[len(tried) - 1]

    start = np.zeros(len(experts))
    if target is not None:
        start[target] = 1.0
    # its first model of the loss takes two looks a weight, whatever it is allowed
    budget = max(settings.steps or _EVALUATIONS, 2 * len(experts) + 2)
    options = {"maxfev": budget, "initial_tr_radius": _REACH}
    minimize(objective, start, method="COBYQA", bounds=Bounds(-_BOUND, _BOUND), options=options)
    if len(kept) % settings.every and len(kept) > known:
        journal.keep(stage, kept)
    best = tried[int(np.argmin(kept[: len(tried)]))]
    curve = tuple((number, value, None) for number, value in enumerate(kept, 1))
    found = Mixed(tuple(experts), torch.tensor(best, dtype=torch.float32)[owner], curve=curve)
    return found.validated(problem)
