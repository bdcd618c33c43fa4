"""How adapters are mixed for a task: tuned by gradient, searched without one, or by a merging method as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from merging.api.merge_tensors import merge_deltas
from merging.errors import OptionError, nearest
from merging.maths.delta import Dense, LowRank
from merging.maths.linalg import compress
from merging.methods import METHODS, chain
from merging.recycling.closeness import CLOSENESS
from merging.recycling.experts import Expert
from merging.recycling.journal import Journal
from merging.recycling.mixture import Activation
from merging.recycling.problem import Mixed, Problem, alone
from merging.recycling.search import searched
from merging.recycling.settings import Granularity, Settings
from merging.recycling.training import Course, train

__all__ = ["SEARCHED", "TUNED", "Tuning", "check_method", "fit"]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Coefficients by gradient: what belongs to one, what becomes of it, where it starts ("mean" is 1/N), how fast."""

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
    # The winner of the study's search (arXiv 2602.12323): from the base itself, softly kept from negative coefficients.
    "ours": Tuning("one coefficient a module, from zero, by the loss", "module", "leaky", 0.0, 5e-2),
    # LoRA Soups (arXiv 2410.13025): their rate of 1e-4 is for ten thousand examples; with a hundred nothing would move.
    "cat": Tuning("shares of each layer that add up to 1, by the loss", "layer", "softmax", 0.0, 5e-2),
    # AdaMerging (arXiv 2310.02575), layer-wise: its constants, except that the labels' loss tells when to stop.
    "adamerging": Tuning(
        "one coefficient a module, by how sure the answers are",
        "module",
        "linear",
        0.3,
        1e-3,
        500,
        16,
        True,
        (0.0, 1.0),
    ),
}
"""The methods that are tuned by gradient."""

SEARCHED = "lorahub"


def check_method(settings: Settings, classifies: bool) -> None:
    """Refuse, before anything is run, a method or selection that is not known or cannot do what is asked.

    Raises :class:`~merging.errors.OptionError`.
    """
    name, select = settings.method, settings.select
    if (select in CLOSENESS or select == "l2") and settings.target_lora == "none":
        raise OptionError(f"select = {select}: compares with a target LoRA: give one, or train one (--target-lora)")
    if name in TUNED:
        if TUNED[name].entropy and not classifies:
            raise OptionError(
                f"{name} makes answers sure, which says little of texts (a repeated word is very sure): use ours"
            )
        return
    if settings.granularity and name != SEARCHED:
        raise OptionError(f"{name} has no coefficients to tune: leave --granularity out")
    if name == SEARCHED:
        if settings.granularity not in (None, "expert"):
            raise OptionError(f"{name} searches one coefficient an adapter: use ours for finer ones")
        if find_spec("scipy") is None:
            raise OptionError(f"{name} searches with scipy: pip install 'merging[recycle]'")
        return
    if not all(link in METHODS for link in name.split("+")):
        known = (*TUNED, SEARCHED, *METHODS)
        raise OptionError(
            f"there is no method {name!r}{nearest(name, known)}: use {', '.join((*TUNED, SEARCHED))}, or one of merge "
            f"methods"
        )
    if chain(name, {}).merge_space == "weights" and name != "linear":
        raise OptionError(f"{name} merges weights, and adapters are changes: use another method")


def fit(problem: Problem, experts: Sequence[Expert], journal: Journal, stage: str, target: int | None = None) -> Mixed:
    """Mix adapters by the method of the settings; ``target`` is the position of the one for this very task."""
    name = problem.settings.method
    if name in TUNED:
        return _tuned(problem, experts, TUNED[name], journal, stage)
    if name == SEARCHED:
        return searched(problem, experts, journal, stage, target)
    return _static(problem, experts, name)


def _tuned(problem: Problem, experts: Sequence[Expert], tuning: Tuning, journal: Journal, stage: str) -> Mixed:
    settings = problem.settings
    granularity = settings.granularity or tuning.granularity
    mixture = problem.mixture(experts, granularity, tuning.activation)
    coefficients = mixture.full(tuning.start).requires_grad_(True)
    course = Course(
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
    done = train(
        [coefficients],
        lambda: mixture.at(coefficients),
        problem.model,
        problem.learn,
        problem.valid,
        course,
        journal,
        stage,
    )
    return Mixed(tuple(experts), done.values[0], done.loss, granularity, tuning.activation, done.curve)


def _static(problem: Problem, experts: Sequence[Expert], name: str) -> Mixed:
    """A merging method with its defaults: one change a module, cut to the sum of the ranks where it is of full rank."""
    merged = merge_deltas([expert.deltas for expert in experts], method=name, keys=[each.name for each in experts])
    deltas: dict[str, LowRank] = {}
    for target, delta in merged.items():
        if isinstance(delta, Dense):
            rank = sum(expert.deltas[target].rank for expert in experts if target in expert.deltas)
            transposed = problem.model.places[target].transposed
            matrix = delta.value.mT if transposed else delta.value
            delta = compress(matrix, rank, tuple(delta.value.shape), transposed)[0]
        deltas[target] = delta
    return alone(Expert(name, deltas)).validated(problem)
