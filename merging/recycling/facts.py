"""The figures of a run, for the JSON of its report."""

from __future__ import annotations

import json
from typing import Any

from merging.recycling.fold import FoldedLora
from merging.recycling.pool_adapters import UsableAdapters
from merging.recycling.problem import Problem
from merging.recycling.stages import Outcome

__all__ = ["collect_facts"]


def collect_facts(
    problem: Problem, base: str, pool: UsableAdapters, outcome: Outcome, folded: FoldedLora
) -> dict[str, Any]:
    """Return the figures of a run by name."""
    chosen = [
        {"name": expert.name, "owner": expert.owner, "loss": outcome.losses[expert.name], "rank": expert.rank}
        for expert in outcome.chosen.experts
    ]
    validated = {
        "base": outcome.base.loss,
        "few-shot LoRA": outcome.few_shot.mixed.loss,
        "best single adapter": outcome.single.loss,
        "simple average": outcome.average.loss,
        "tuned": outcome.tuned.loss,
        "returned": outcome.merge.loss,
    }
    return {
        "base": base,
        "settings": json.loads(problem.settings.model_dump_json()),
        "candidates": len(pool.usable) + len(pool.left_out),
        "left_out": pool.left_out,
        "passed_over": outcome.chosen.passed_over,
        "scores": outcome.chosen.scores,
        "chosen": chosen,
        "selection_correlation": outcome.correlation,
        "came_back_instead": outcome.fallback,
        "few_shot": {"rate": outcome.few_shot.rate, "validation": dict(outcome.few_shot.tried)},
        "validation_loss": validated,
        "weights": _weights(problem, outcome),
        "curves": {"merge": outcome.tuned.curve, "few-shot LoRA": outcome.few_shot.mixed.curve},
        "fold": {"rank": folded.rank, "energy_kept": folded.kept, "lost": dict(folded.lost)},
    }


def _weights(problem: Problem, outcome: Outcome) -> dict[str, Any]:
    """Return the final coefficients by adapter, one for each group; None where an adapter has no part in a group."""
    tuned = outcome.tuned
    layout = tuned.mixture(problem).layout
    values = layout.activate(tuned.coefficients, tuned.activation).tolist()
    groups = {group: number for number, group in enumerate(dict.fromkeys(layout.names))}
    table: dict[str, list[float | None]] = {expert.name: [None] * len(groups) for expert in tuned.experts}
    for value, expert, group in zip(values, layout.experts.tolist(), layout.names, strict=True):
        table[tuned.experts[expert].name][groups[group]] = value
    return {"granularity": tuned.granularity, "groups": list(groups), "by_adapter": table}
