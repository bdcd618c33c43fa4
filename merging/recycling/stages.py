"""The stages of a run: train the few-shot LoRA, choose adapters, mix them, mix the controls, and measure everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from merging.errors import InputError
from merging.maths.lazy_torch import torch
from merging.recycling.controls import CONTROLS
from merging.recycling.fewshot import FewShot, train_few_shot
from merging.recycling.mixing import fit
from merging.recycling.model import EncodedExample, Scores
from merging.recycling.pool_adapters import BASE, FEW_SHOT, AdapterRef, Expert, UsableAdapters, open_expert
from merging.recycling.problem import Problem, WeightedAdapters, simple_average, single_adapter
from merging.recycling.report import AVERAGE, MERGE, SINGLE, Measurement
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.recycling.selection import ChosenAdapters, Workers, choose, score_candidates, spearman

__all__ = ["OnEvent", "Outcome", "best_of", "measure", "run_stages"]

OnEvent = Callable[[str], None]
"""Receives a line about each stage when it begins."""

_SEED_STEP = 1_000_003
"""Distance between the seeds of two draws of a control."""

Guarded = tuple[WeightedAdapters, str | None]
"""A mixture, and the name of the baseline that replaced it, if one did."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Outcome:
    """The results of mixing.

    Attributes:
        chosen: The adapters that were selected from the pool.
        few_shot: The LoRA trained on the examples.
        target: The adapter for this very task that was mixed in first, if any.
        tuned: The mixture as the method found it.
        merge: The result: ``tuned``, or the baseline ``fallback`` where that has the lower validation loss.
        fallback: The name of the baseline that replaced ``tuned``, or None.
        trivial: The baselines by name: the base, the target alone, the best single adapter.
        base: The base without adapters.
        single: The best single adapter.
        average: The simple average of the mixed adapters.
        controls: For each kind of control one guarded mixture a draw.
        losses: The loss of each chosen adapter alone, on training and validation examples.
        correlation: Rank correlation of the selection's scores with these losses (negated), where both exist.
    """

    chosen: ChosenAdapters
    few_shot: FewShot
    target: Expert | None
    tuned: WeightedAdapters
    merge: WeightedAdapters
    fallback: str | None
    trivial: tuple[tuple[str, WeightedAdapters], ...]
    base: WeightedAdapters
    single: WeightedAdapters
    average: WeightedAdapters
    controls: Mapping[str, Sequence[Guarded]]
    losses: Mapping[str, float]
    correlation: float | None


def run_stages(
    problem: Problem,
    pool: UsableAdapters,
    checkpoint: RunCheckpoint,
    on_event: OnEvent,
    workers: Workers | None = None,
) -> Outcome:
    """Train the few-shot LoRA, choose adapters, mix them, and mix the controls in the same way.

    ``workers`` score the adapters, if there are any.

    Raises :class:`~merging.errors.InputError` if every adapter equals the target LoRA.
    """
    settings = problem.settings
    on_event("training a LoRA on the examples")
    few_shot = train_few_shot(problem, pool.modules, checkpoint)
    target = _target(problem, few_shot)
    on_event(f"choosing among {len(pool.usable)} adapters by {settings.select}")
    scores = score_candidates(pool.usable, problem, target, checkpoint, workers)
    taken = [target] if target else []
    chosen = choose(pool.usable, scores, problem, taken)
    if not chosen.experts:
        raise InputError("no adapter of the pool is left to mix: all are the same as the target LoRA")
    losses = _losses(problem, chosen, checkpoint)
    base = single_adapter(None).validate(problem)
    best = min(chosen.experts, key=lambda expert: (losses[expert.name], expert.name))
    single = single_adapter(best).validate(problem)
    experts = [*taken, *chosen.experts]
    on_event(f"mixing {len(experts)} adapters by {settings.method}")
    tuned = fit(problem, experts, checkpoint, "fit", target=0 if target else None)
    unmixed = [(BASE, base), *((each.name, single_adapter(each).validate(problem)) for each in taken)]
    trivial = (*unmixed, (best.name, single))
    merge, fallback = best_of(tuned, trivial)
    return Outcome(
        chosen=chosen,
        few_shot=few_shot,
        target=target,
        tuned=tuned,
        merge=merge,
        fallback=fallback,
        trivial=trivial,
        base=base,
        single=single,
        controls=_mix_controls(problem, chosen, taken, unmixed, checkpoint=checkpoint, on_event=on_event),
        average=simple_average(experts).validate(problem),
        losses=losses,
        correlation=_correlation(problem, chosen, losses),
    )


def _target(problem: Problem, few_shot: FewShot) -> Expert | None:
    """Return the LoRA for this very task that is mixed in first, if the settings ask for one."""
    wanted = problem.settings.target_lora
    if wanted == "none":
        return None
    if wanted == "train":
        return few_shot.expert
    return open_expert(AdapterRef(wanted, wanted), problem.model.hook_points)


def _losses(problem: Problem, chosen: ChosenAdapters, checkpoint: RunCheckpoint) -> dict[str, float]:
    """Return the loss of each chosen adapter alone, on training and validation examples."""
    if problem.settings.select == "evaluation":
        return {expert.name: -chosen.scores[expert.name] for expert in chosen.experts}
    known: dict[str, float] = checkpoint.get("singles") or {}
    for expert in chosen.experts:
        if expert.name not in known:
            loss = single_adapter(expert).scores(problem, problem.shots).loss
            known[expert.name] = loss if isfinite(loss) else inf
            checkpoint.keep("singles", known)
    return known


def _mix_controls(
    problem: Problem,
    chosen: ChosenAdapters,
    taken: Sequence[Expert],
    unmixed: Sequence[tuple[str, WeightedAdapters]],
    *,
    checkpoint: RunCheckpoint,
    on_event: OnEvent,
) -> dict[str, list[Guarded]]:
    """Mix adapters without knowledge in the place of the chosen ones, as often as the settings ask for."""
    settings = problem.settings
    controls: dict[str, list[Guarded]] = {}
    for name, control in CONTROLS.items():
        on_event(f"mixing the same with {control.title}")
        controls[name] = []
        for draw in range(settings.draws):
            unknowing = [control.make(expert, settings.seed + _SEED_STEP * draw) for expert in chosen.experts]
            mixed = fit(problem, [*taken, *unknowing], checkpoint, f"{name} {draw}", target=0 if taken else None)
            controls[name].append(best_of(mixed, unmixed))
    return controls


def _correlation(problem: Problem, chosen: ChosenAdapters, losses: Mapping[str, float]) -> float | None:
    """Return the rank correlation of scores and losses; None for few adapters, and for scores that are losses."""
    if len(chosen.experts) <= 2 or problem.settings.select in ("evaluation", "random"):
        return None
    names = [expert.name for expert in chosen.experts]
    return spearman([chosen.scores[name] for name in names], [-losses[name] for name in names])


def best_of(tuned: WeightedAdapters, trivial: Sequence[tuple[str, WeightedAdapters]]) -> Guarded:
    """Return the mixture, or the best baseline with its name if its validation loss is lower."""
    name, best = min(trivial, key=lambda pair: pair[1].loss)
    return (best, name) if best.loss < tuned.loss else (tuned, None)


def measure(
    problem: Problem,
    outcome: Outcome,
    folded: WeightedAdapters | None,
    items: Sequence[EncodedExample],
    checkpoint: RunCheckpoint,
) -> list[Measurement]:
    """Measure all rows of the report on the same examples.

    ``folded`` is the merge after folding, if folding lost a part of it.
    """

    def scores(stage: str, mixed: WeightedAdapters) -> Scores:
        known = checkpoint.get(f"scores {stage}")
        if known is None:
            found = mixed.scores(problem, items)
            known = {"losses": found.losses, "right": found.right}
            checkpoint.keep(f"scores {stage}", known)
        return Scores(known["losses"], known["right"])

    settings, target, few_shot = problem.settings, outcome.target, outcome.few_shot
    note = f"rank {few_shot.expert.rank}, rate {few_shot.rate:g}"
    rows = [
        Measurement(BASE, scores(BASE, outcome.base)),
        Measurement(FEW_SHOT, scores("few-shot", few_shot.mixed), note),
    ]
    if target and target is not few_shot.expert:
        rows.append(Measurement("target LoRA", scores("target", single_adapter(target)), target.name))
    count = len(outcome.average.experts)
    rows.append(Measurement(SINGLE, scores("single", outcome.single), outcome.single.experts[0].name))
    rows.append(Measurement(AVERAGE, scores("average", outcome.average), f"of {count}"))
    note = f"{settings.method}, {count} adapters"
    if outcome.fallback:
        rows.append(Measurement("the mixture", scores("tuned", outcome.tuned), f"{note}: not what came back"))
        note = f"{outcome.fallback} alone: better on validation than the mixture"
    rows.append(Measurement(MERGE, scores("merge", outcome.merge), note))
    if folded:
        rows.append(Measurement("the merge, folded", scores("folded", folded), f"to rank {settings.rank}"))
    for name, draws in outcome.controls.items():
        measured = [scores(f"{name} {draw}", mixed) for draw, (mixed, _) in enumerate(draws)]
        replaced = dict.fromkeys(fallback for _, fallback in draws if fallback)
        remarks = [f"mean of {len(measured)} draws"] if len(measured) > 1 else []
        remarks += [f"{fallback} came back" for fallback in replaced]
        rows.append(Measurement(CONTROLS[name].title, _mean_scores(measured), ", ".join(remarks)))
    return rows


def _mean_scores(draws: Sequence[Scores]) -> Scores:
    """Return the mean over draws of the loss and the right answers of each example."""
    losses = sum((each.losses for each in draws), start=torch.tensor(0.0))
    right = sum((each.right for each in draws), start=torch.tensor(0.0))
    return Scores(losses / len(draws), right / len(draws))
