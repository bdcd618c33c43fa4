"""The order in which candidates are tried: trivial choices, halving over examples, then refinement of the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merging.errors import OptionError, option
from merging.searches.proposers import make_proposer
from merging.searches.settings import BY_GRADIENT, SearchSettings, Strategy
from merging.searches.spaces import CandidateSpace, MergeCandidate, Point
from merging.searches.trials import Trial, Trials

__all__ = ["check_budget", "run_strategy"]

_ETA = 3
"""One candidate in this many goes on to this many times as many examples."""

_LEAST = 24
"""The fewest examples of the smallest task on which candidates are compared, if there are as many."""

_REFINED = 2
"""The chains that are refined."""


def check_budget(settings: SearchSettings, trivial: Sequence[MergeCandidate], spaces: Sequence[CandidateSpace]) -> None:
    """Refuse a budget that does not reach every chain. Raises :class:`~merging.errors.OptionError`."""
    needed = len(trivial) + len(spaces) + (settings.strategy in BY_GRADIENT)
    if settings.budget < needed:
        raise OptionError(
            f"{option('budget', settings.budget)}: {len(trivial)} trivial choices and {len(spaces)} chains need at "
            f"least {needed} evaluations"
        )


def run_strategy(
    trials: Trials,
    trivial: Sequence[MergeCandidate],
    spaces: Sequence[CandidateSpace],
    settings: SearchSettings,
    strategy: Strategy,
    tune: Callable[[], MergeCandidate],
) -> None:
    """Try candidates until the budget is used.

    Args:
        trials: the trials, with the budget.
        trivial: the choices that need no search.
        spaces: the chains with their ranges.
        settings: the settings.
        strategy: the refinement.
        tune: returns the candidate of a strategy by gradient.

    The trivial choices are measured on all examples. Half of what is left goes to successive halving (Jamieson and
    Talwalkar 2016): points spread over all spaces on a ninth of the examples, a third of them on a third, and a ninth
    on all. The other half refines the best two chains on all examples. A strategy by gradient makes one candidate
    instead, and all that is left goes to halving.
    """
    trials.measure(trivial)
    if strategy in BY_GRADIENT:
        trials.measure([tune()])
        _halve(trials, spaces, settings, trials.left)
        return
    tunable = any(space.dimensions for space in spaces)
    points = _halve(trials, spaces, settings, trials.left // 2 if tunable else trials.left)
    if tunable:
        _refine(trials, points, settings, strategy)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A candidate at its point of a space."""

    space: CandidateSpace
    point: Point
    candidate: MergeCandidate


def _halve(trials: Trials, spaces: Sequence[CandidateSpace], settings: SearchSettings, budget: int) -> list[_Placed]:
    """Measure points of all spaces on more and more examples. Return all points."""
    shares = _shares(min(trials.examples))
    count = max(len(spaces), int(budget / sum(_ETA**-rung for rung in range(len(shares)))))
    placed = _spread(spaces, count, settings.seed)
    by_key = {each.candidate.key: each for each in placed}
    current = list(by_key)
    for share in shares:
        measured = trials.measure([by_key[key].candidate for key in current], share)
        measured.sort(key=lambda trial: trial.rank_key, reverse=True)
        kept = [trial.candidate.key for trial in measured if not trial.error]
        current = kept[: max(1, len(current) // _ETA)]
    return list(by_key.values())


def _shares(examples: int) -> list[float]:
    """Return the shares of the examples that are used one after the other, the last one all."""
    wanted = [_ETA**-rung for rung in (2, 1, 0)]
    return sorted({max(share, min(1.0, _LEAST / examples)) for share in wanted})


def _spread(spaces: Sequence[CandidateSpace], count: int, seed: int) -> list[_Placed]:
    """Return points of all spaces: one of a space without dimensions, and equally many of the others."""
    tunable = sum(bool(space.dimensions) for space in spaces)
    rest = count - (len(spaces) - tunable)
    placed: list[_Placed] = []
    number = 0
    for space in spaces:
        share = 1
        if space.dimensions:
            share = max(1, rest // tunable + (number < rest % tunable))
            number += 1
        placed += [_Placed(space, point, space.candidate(point)) for point in space.points(share, seed)]
    return placed


def _refine(trials: Trials, placed: list[_Placed], settings: SearchSettings, strategy: Strategy) -> None:
    """Propose points of the best chains in turn, and measure them on all examples, until the budget is used."""
    scored = [(each, trials.found[each.candidate.key]) for each in placed if each.candidate.key in trials.found]
    ranked = sorted((pair for pair in scored if not pair[1].error), key=_merit, reverse=True)
    best = [each.space for each, _ in ranked if each.space.dimensions]
    chosen = list(dict.fromkeys(space.text for space in best))[:_REFINED]
    spaces = {space.text: space for space in best}
    proposers = {}
    for text in chosen:
        known = [(each.point, trial.score) for each, trial in ranked if each.space.text == text and trial.complete]
        known = known or [(each.point, trial.score) for each, trial in ranked if each.space.text == text][:1]
        proposers[text] = make_proposer(strategy, known, settings.seed, text)
    stale = 0
    while trials.left > 0 and proposers and stale < 50:  # few choices may be tried out before the budget is used
        for text, proposer in proposers.items():
            before = trials.used
            points = proposer.ask()
            candidates = [spaces[text].candidate(point) for point in points]
            trials.measure(candidates)
            results = [trials.found.get(each.key) for each in candidates]
            stale = 0 if trials.used > before else stale + 1
            if any(result is None or not (result.complete or result.error) for result in results):
                return  # the budget ended within the batch
            proposer.observe(points, [result.score for result in results if result is not None])


def _merit(pair: tuple[_Placed, Trial]) -> tuple[bool, float, float, int]:
    """Return a key by which trials on all examples are above the others."""
    return pair[1].complete, *pair[1].rank_key
