"""LoraHub: one weight an adapter, searched without gradients (Huang et al. 2023, arXiv 2307.13269)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from merging.maths.lazy_torch import torch
from merging.recycling.pool_adapters import Expert
from merging.recycling.problem import Problem, WeightedAdapters
from merging.recycling.run_checkpoint import RunCheckpoint

__all__ = ["search_weights"]

_BOUND, _L1, _EVALUATIONS, _REACH = 1.5, 0.05, 100, 0.5
_NOWHERE = 1e9
"""The value in place of a loss that is not finite."""


def search_weights(
    problem: Problem, experts: Sequence[Expert], checkpoint: RunCheckpoint, stage: str, target: int | None
) -> WeightedAdapters:
    """Search weights within 1.5 of zero that minimize the training loss plus 0.05 times their mean absolute value.

    Departures from the paper: changes are added instead of factors, whose products across adapters mean nothing. The
    search starts at the target LoRA (position ``target``, weight 1) if there is one, as searches from zero did not
    reach it. COBYQA (Ragonneau and Zhang 2024) replaces Nevergrad's choice.
    """
    import numpy as np
    from scipy.optimize import Bounds, minimize

    settings, model = problem.settings, problem.model
    l1 = _L1 if settings.l1 is None else settings.l1
    mixture = problem.mixture(experts, "expert", "linear")
    owner = mixture.layout.experts
    kept: list[float] = checkpoint.get(stage) or []
    known = len(kept)
    tried: list[Any] = []

    def objective(weights: Any) -> float:
        """Return the objective at some weights. A resumed run receives the values that it computed before."""
        if len(tried) == len(kept):
            with mixture.at(torch.tensor(weights, dtype=torch.float32)[owner]):
                loss = model.scores(problem.learn).loss
            kept.append(loss + l1 * float(np.abs(weights).mean()) if isfinite(loss) else _NOWHERE)
            if len(kept) % settings.every == 0:
                checkpoint.keep(stage, kept)
        tried.append(np.array(weights))
        return kept[len(tried) - 1]

    start = np.zeros(len(experts))
    if target is not None:
        start[target] = 1.0
    # COBYQA's first model of the loss takes two evaluations a weight, whatever its budget.
    budget = max(settings.steps or _EVALUATIONS, 2 * len(experts) + 2)
    options = {"maxfev": budget, "initial_tr_radius": _REACH}
    minimize(objective, start, method="COBYQA", bounds=Bounds(-_BOUND, _BOUND), options=options)
    if len(kept) % settings.every and len(kept) > known:
        checkpoint.keep(stage, kept)
    best = tried[int(np.argmin(kept[: len(tried)]))]
    curve = tuple((number, value, None) for number, value in enumerate(kept, 1))
    found = WeightedAdapters(tuple(experts), torch.tensor(best, dtype=torch.float32)[owner], curve=curve)
    return found.validate(problem)
