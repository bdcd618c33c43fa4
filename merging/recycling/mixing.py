"""Mix adapters for a task: tune coefficients by gradient, search them without, or apply a merge method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from merging.api.merge_tensors import merge_deltas
from merging.errors import OptionError, nearest, option
from merging.maths.delta import Dense, LowRank
from merging.maths.linalg import compress_matrix
from merging.methods import chain, method_names
from merging.recycling.mixture import Activation
from merging.recycling.pool_adapters import Expert
from merging.recycling.problem import Problem, WeightedAdapters, single_adapter
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.recycling.search import search_weights
from merging.recycling.settings import Granularity, Settings
from merging.recycling.similarity import SIMILARITIES
from merging.recycling.training import TrainingPlan, train

__all__ = ["SEARCHED", "TUNED", "Tuning", "check_mixing", "fit"]


@dataclass(frozen=True, slots=True)
class Tuning:
    """A method that tunes coefficients by gradient.

    Attributes:
        summary: One line about the method.
        granularity: The parts of an adapter that share a coefficient.
        activation: The function that is applied to coefficients.
        start: The initial value of every coefficient.
        rate: The learning rate.
        steps: The number of steps.
        size: The examples of a step; by default, as the settings say.
        entropy: Whether the entropy of the predictions is minimized instead of the labels' loss.
        bounds: The range to which coefficients are clamped after each step.
    """

    summary: str
    granularity: Granularity
    activation: Activation
    start: float
    rate: float
    steps: int = 100
    size: int | None = None
    entropy: bool = False
    bounds: tuple[float, float] | None = None


TUNED: dict[str, Tuning] = {
    # The winner of the study's search (arXiv 2602.12323): starts at the base, and dampens negative coefficients.
    "ours": Tuning(
        "one coefficient a module, from zero, by the loss",
        granularity="module",
        activation="leaky",
        start=0.0,
        rate=5e-2,
    ),
    # LoRA Soups (arXiv 2410.13025): their rate of 1e-4 is for ten thousand examples; with a hundred, nothing moves.
    "cat": Tuning(
        "shares of each layer that add up to 1, by the loss",
        granularity="layer",
        activation="softmax",
        start=0.0,
        rate=5e-2,
    ),
    # AdaMerging (arXiv 2310.02575), layer-wise, with its constants. But the labels' loss decides when to stop.
    "adamerging": Tuning(
        "one coefficient a module, by the certainty of the answers",
        granularity="module",
        activation="linear",
        start=0.3,
        rate=1e-3,
        steps=500,
        size=16,
        entropy=True,
        bounds=(0.0, 1.0),
    ),
}
"""The methods that are tuned by gradient."""

SEARCHED = "lorahub"


def check_mixing(settings: Settings, classifies: bool) -> None:
    """Check that the method and the selection exist and can do the task.

    Raises :class:`~merging.errors.OptionError`.
    """
    name, select = settings.method, settings.select
    if (select in SIMILARITIES or select == "l2") and settings.target_lora == "none":
        raise OptionError(
            f"select = {select}: compares with a target LoRA: give one, or train one ({option('target_lora')})"
        )
    if name in TUNED:
        if TUNED[name].entropy and not classifies:
            raise OptionError(
                f"{name} makes answers sure, which says little of texts (a repeated word is very sure): use ours"
            )
        return
    if settings.granularity and name != SEARCHED:
        raise OptionError(f"{name} has no coefficients to tune: leave {option('granularity')} out")
    if name == SEARCHED:
        if settings.granularity not in (None, "expert"):
            raise OptionError(f"{name} searches one coefficient an adapter: use ours for finer ones")
        if find_spec("scipy") is None:
            raise OptionError(f"{name} searches with scipy: pip install 'merging[recycle]'")
        return
    methods = method_names()
    if not all(link.replace("-", "_") in methods for link in name.split("+")):
        known = (*TUNED, SEARCHED, *methods)
        raise OptionError(
            f"there is no method {name!r}{nearest(name, known)}: use {', '.join((*TUNED, SEARCHED))}, or one of merge "
            f"methods"
        )
    if chain(name, {}).merge_space == "weights" and name != "linear":
        raise OptionError(f"{name} merges weights, and adapters are changes: use another method")


def fit(
    problem: Problem, experts: Sequence[Expert], checkpoint: RunCheckpoint, stage: str, target: int | None = None
) -> WeightedAdapters:
    """Mix adapters by the method of the settings. ``target`` is the position of the adapter for this very task."""
    name = problem.settings.method
    if name in TUNED:
        return _tune(problem, experts, TUNED[name], checkpoint, stage)
    if name == SEARCHED:
        return search_weights(problem, experts, checkpoint, stage, target)
    return _apply_merge_method(problem, experts, name)


def _tune(
    problem: Problem, experts: Sequence[Expert], tuning: Tuning, checkpoint: RunCheckpoint, stage: str
) -> WeightedAdapters:
    settings = problem.settings
    granularity = settings.granularity or tuning.granularity
    mixture = problem.mixture(experts, granularity, tuning.activation)
    coefficients = mixture.full(tuning.start).requires_grad_(True)
    plan = TrainingPlan(
        rate=settings.rate or tuning.rate,
        steps=settings.steps or tuning.steps,
        size=tuning.size or settings.batch,
        micro=settings.micro_batch,
        every=settings.every,
        patience=settings.patience,
        entropy=tuning.entropy,
        bounds=tuning.bounds,
        l1=settings.l1 or 0.0,
        seed=settings.seed,
    )
    result = train(
        [coefficients],
        lambda: mixture.at(coefficients),
        problem=problem,
        plan=plan,
        checkpoint=checkpoint,
        stage=stage,
    )
    return WeightedAdapters(
        experts=tuple(experts),
        coefficients=result.values[0],
        loss=result.loss,
        granularity=granularity,
        activation=tuning.activation,
        curve=result.curve,
    )


def _apply_merge_method(problem: Problem, experts: Sequence[Expert], name: str) -> WeightedAdapters:
    """Apply a merge method with its defaults. Changes of full rank are truncated to the sum of the adapters' ranks."""
    merged = merge_deltas([expert.deltas for expert in experts], method=name, keys=[each.name for each in experts])
    deltas: dict[str, LowRank] = {}
    for target, delta in merged.items():
        if isinstance(delta, Dense):
            rank = sum(expert.deltas[target].rank for expert in experts if target in expert.deltas)
            transposed = problem.model.hook_points[target].transposed
            matrix = delta.value.mT if transposed else delta.value
            delta = compress_matrix(matrix, rank, tuple(delta.value.shape), transposed)[0]
        deltas[target] = delta
    return single_adapter(Expert(name, deltas)).validate(problem)
