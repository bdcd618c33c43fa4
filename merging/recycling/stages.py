"""The stages of a run: what is trained, chosen, mixed and guarded, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from merging.errors import InputError
from merging.recycling.controls import CONTROLS
from merging.recycling.experts import BASE, FEW_SHOT, Candidate, Expert, Opened, open_expert
from merging.recycling.fewshot import FewShot, few_shot
from merging.recycling.journal import Journal
from merging.recycling.methods import fit
from merging.recycling.model import Item, Scores
from merging.recycling.problem import Mixed, Problem, alone, mean
from merging.recycling.report import AVERAGE, MERGE, SINGLE, Measured
from merging.recycling.selection import Chosen, choose, scored, spearman

__all__ = ["Outcome", "Told", "carried_out", "guarded", "measured"]

Told = Callable[[str], None]
"""Told what begins now."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of mixing. ``merge`` is what is returned: ``tuned``, or the one of the ``trivial`` points (base, target
    alone, best single adapter) named ``fallback`` where that validated better.

    ``controls`` holds for each kind of adapters that know nothing one mixture a draw, and what came back instead of it;
    ``losses`` those of the chosen adapters alone, on the examples; ``correlation`` that of the selection's scores with
    these losses' order.
    """

    chosen: Chosen
    few_shot: FewShot
    target: Expert | None
    tuned: Mixed
    merge: Mixed
    fallback: str | None
    trivial: tuple[tuple[str, Mixed], ...]
    base: Mixed
    single: Mixed
    average: Mixed
    controls: dict[str, list[tuple[Mixed, str | None]]]
    losses: dict[str, float]
    correlation: float | None


def carried_out(problem: Problem, pool: Opened, journal: Journal, told: Told) -> Outcome:
    """Train the few-shot LoRA, choose adapters, mix them, and do the same with adapters that know nothing."""
    settings = problem.settings
    told("training a LoRA on the examples")
    yardstick = few_shot(problem, pool.modules, journal)
    target = _target(problem, yardstick)
    told(f"choosing among {len(pool.usable)} adapters by {settings.select}")
    scores = scored(pool.usable, problem, target, journal)
    taken = [target] if target else []
    chosen = choose(pool.usable, scores, problem, taken)
    if not chosen.experts:
        raise InputError("no adapter of the pool is left to mix: all are the same as the target LoRA")
    losses = _losses(problem, chosen, journal)
    base = alone(None).validated(problem)
    best = min(chosen.experts, key=lambda expert: (losses[expert.name], expert.name))
    single = alone(best).validated(problem)
    experts = [*taken, *chosen.experts]
    told(f"mixing {len(experts)} adapters by {settings.method}")
    place = 0 if target else None
    tuned = fit(problem, experts, journal, "fit", place)
    unmixed = [(BASE, base), *((each.name, alone(each).validated(problem)) for each in taken)]
    trivial = (*unmixed, (best.name, single))
    merge, fallback = guarded(tuned, trivial)
    controls: dict[str, list[tuple[Mixed, str | None]]] = {}
    for name, control in CONTROLS.items():
        told(f"mixing the same with {control.title}")
        controls[name] = []
        for draw in range(settings.draws):
            unknowing = [control.make(expert, settings.seed + 1_000_003 * draw) for expert in chosen.experts]
            mixed = fit(problem, [*taken, *unknowing], journal, f"{name} {draw}", place)
            controls[name].append(guarded(mixed, unmixed))
    several = len(chosen.experts) > 2 and settings.select not in ("evaluation", "random")
    names = [expert.name for expert in chosen.experts]
    correlation = spearman([scores[n] for n in names], [-losses[n] for n in names]) if several else None
    average = mean(experts).validated(problem)
    return Outcome(
        chosen, yardstick, target, tuned, merge, fallback, trivial, base, single, average, controls, losses, correlation
    )


def _target(problem: Problem, yardstick: FewShot) -> Expert | None:
    """The LoRA for this very task that is mixed in first, if one is wanted."""
    wanted = problem.settings.target_lora
    if wanted == "none":
        return None
    if wanted == "train":
        return yardstick.expert
    return open_expert(Candidate(wanted, wanted), problem.model.places)


def _losses(problem: Problem, chosen: Chosen, journal: Journal) -> dict[str, float]:
    """The loss of each chosen adapter alone, on all examples that may be looked at."""
    if problem.settings.select == "evaluation":
        return {expert.name: -chosen.scores[expert.name] for expert in chosen.experts}
    kept: dict[str, float] = journal.get("singles") or {}
    for expert in chosen.experts:
        if expert.name not in kept:
            loss = alone(expert).scores(problem, problem.shots).loss
            kept[expert.name] = loss if isfinite(loss) else inf
            journal.keep("singles", kept)
    return kept


def guarded(tuned: Mixed, trivial: Sequence[tuple[str, Mixed]]) -> tuple[Mixed, str | None]:
    """What is no worse on validation than any trivial point, and the name of the one that came back instead."""
    name, best = min(trivial, key=lambda pair: pair[1].loss)
    return (best, name) if best.loss < tuned.loss else (tuned, None)


def measured(
    problem: Problem, outcome: Outcome, folded: Mixed | None, items: Sequence[Item], journal: Journal, told: Told
) -> list[Measured]:
    """All rows of the report, on the same examples; ``folded`` is the truncated merge, if truncating lost something."""
    told("measuring")

    def scores(stage: str, mixed: Mixed) -> Scores:
        kept = journal.get(f"scores {stage}")
        if kept is None:
            found = mixed.scores(problem, items)
            kept = {"losses": found.losses, "right": found.right}
            journal.keep(f"scores {stage}", kept)
        return Scores(kept["losses"], kept["right"])

    settings, target = problem.settings, outcome.target
    yardstick = outcome.few_shot
    note = f"rank {yardstick.expert.rank}, rate {yardstick.rate:g}"
    rows = [
        Measured(BASE, scores(BASE, outcome.base)),
        Measured(FEW_SHOT, scores("few-shot", yardstick.mixed), note),
    ]
    if target and target is not yardstick.expert:
        rows.append(Measured("target LoRA", scores("target", alone(target)), target.name))
    count = len(outcome.average.experts)
    rows.append(Measured(SINGLE, scores("single", outcome.single), outcome.single.experts[0].name))
    rows.append(Measured(AVERAGE, scores("average", outcome.average), f"of {count}"))
    note = f"{settings.method}, {count} adapters"
    if outcome.fallback:
        rows.append(Measured("the mixture", scores("tuned", outcome.tuned), f"{note}: not what came back"))
        note = f"{outcome.fallback} alone: better on validation than the mixture"
    rows.append(Measured(MERGE, scores("merge", outcome.merge), note))
    if folded:
        rows.append(Measured("the merge, folded", scores("folded", folded), f"to rank {settings.rank}"))
    for name, draws in outcome.controls.items():
        each = [scores(f"{name} {draw}", mixed) for draw, (mixed, _) in enumerate(draws)]
        mean_of = Scores(
            *(sum(values) / len(each) for values in zip(*((e.losses, e.right) for e in each), strict=True))
        )
        remarks = [f"mean of {len(each)} draws"] if len(each) > 1 else []
        remarks += [f"{instead} came back" for instead in dict.fromkeys(back for _, back in draws if back)]
        rows.append(Measured(CONTROLS[name].title, mean_of, ", ".join(remarks)))
    return rows
