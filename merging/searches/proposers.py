"""Proposers of points: the built-in one, CMA-ES of the package cma, and TPE of Optuna."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from merging.errors import OptionError, option
from merging.maths.lazy_torch import torch
from merging.recycling.seeds import generator
from merging.searches.settings import Strategy
from merging.searches.spaces import Point

__all__ = ["Proposer", "make_proposer", "resolve_strategy"]

_PACKAGES: dict[str, str] = {"cma": "cma", "tpe": "optuna"}
"""The package of a strategy, which the extra ``search`` installs."""

_BATCH = 4


class Proposer(Protocol):
    """Proposes points of a space where scores may be higher, in batches."""

    def ask(self) -> list[Point]:
        """Return the next batch of points."""

    def observe(self, points: Sequence[Point], scores: Sequence[float]) -> None:
        """Receive the scores of the whole batch, larger for better."""


def resolve_strategy(strategy: Strategy) -> Strategy:
    """Return the strategy for ``auto``. Raises :class:`~merging.errors.OptionError` for one that is not installed."""
    package = _PACKAGES.get(strategy)
    if package is not None and find_spec(package) is None:
        raise OptionError(
            f"{option('strategy', strategy)} needs the package {package}: pip install 'merging[search]', or use "
            f"{option('strategy', 'shrink')}"
        )
    return ("cma" if find_spec("cma") else "shrink") if strategy == "auto" else strategy


def make_proposer(strategy: Strategy, known: Sequence[tuple[Point, float]], seed: int, purpose: str) -> Proposer:
    """Return a proposer that begins with what is known.

    Args:
        strategy: ``shrink``, ``cma`` or ``tpe``.
        known: points with their scores, at least one.
        seed: the seed.
        purpose: a name for the draws, different for each space.
    """
    makers: dict[str, Callable[..., Proposer]] = {"cma": _Cma, "tpe": _Tpe}
    return makers.get(strategy, _Shrinking)(known, seed, purpose)


class _Shrinking:
    """Draws normally around the best point, closer where nothing was better; one point of four is anywhere."""

    def __init__(self, known: Sequence[tuple[Point, float]], seed: int, purpose: str) -> None:
        self._best, self._score = max(known, key=lambda each: each[1])
        self._random, self._reach = generator(seed, "shrink", purpose), 0.2

    def ask(self) -> list[Point]:
        count, size = _BATCH, len(self._best)
        near = torch.tensor(self._best) + self._reach * torch.randn(count, size, generator=self._random)
        near[-1] = torch.rand(size, generator=self._random)
        return [tuple(row) for row in _reflect(near).tolist()]

    def observe(self, points: Sequence[Point], scores: Sequence[float]) -> None:
        point, score = max(zip(points, scores, strict=True), key=lambda each: each[1])
        if score > self._score:
            self._best, self._score = point, score
        else:
            self._reach *= 0.7


def _reflect(values: torch.Tensor) -> torch.Tensor:
    """Return values with those outside of 0 to 1 reflected at the border."""
    folded = values.abs() % 2
    return torch.where(folded > 1, 2 - folded, folded)


class _Cma:
    """CMA-ES (Hansen 2016) from the best point on."""

    def __init__(self, known: Sequence[tuple[Point, float]], seed: int, purpose: str) -> None:
        import cma

        best = max(known, key=lambda each: each[1])[0]
        self._size = len(best)
        start = [*best, *([0.5] * (2 - self._size))]  # it has no variant for one dimension
        drawn = int(torch.randint(1, 1 << 30, (1,), generator=generator(seed, "cma", purpose)))
        options = {"bounds": [0, 1], "seed": drawn, "verbose": -9, "verb_log": 0, "verb_disp": 0}
        self._strategy: Any = cma.CMAEvolutionStrategy(start, 0.2, options)
        self._asked: list[Any] = []

    def ask(self) -> list[Point]:
        self._asked = self._strategy.ask()
        return [tuple(map(float, each[: self._size])) for each in self._asked]

    def observe(self, points: Sequence[Point], scores: Sequence[float]) -> None:
        worst = min((score for score in scores if score > float("-inf")), default=0.0)
        self._strategy.tell(self._asked, [-max(score, worst - 1) for score in scores])


class _Tpe:
    """The tree-structured Parzen estimator (Bergstra et al. 2011) of Optuna."""

    def __init__(self, known: Sequence[tuple[Point, float]], seed: int, purpose: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        drawn = int(torch.randint(1, 1 << 30, (1,), generator=generator(seed, "tpe", purpose)))
        self._study: Any = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=drawn, n_startup_trials=0)
        )
        span = optuna.distributions.FloatDistribution(0.0, 1.0)
        names = [f"x{number}" for number in range(len(known[0][0]))]
        self._spans = dict.fromkeys(names, span)
        for point, score in known:
            if score > float("-inf"):
                values = dict(zip(names, point, strict=True))
                self._study.add_trial(optuna.trial.create_trial(params=values, distributions=self._spans, value=score))
        self._asked: list[Any] = []

    def ask(self) -> list[Point]:
        self._asked = [self._study.ask(self._spans) for _ in range(_BATCH)]
        return [tuple(each.params.values()) for each in self._asked]

    def observe(self, points: Sequence[Point], scores: Sequence[float]) -> None:
        import optuna

        for trial, score in zip(self._asked, scores, strict=True):
            failed = score == float("-inf")
            self._study.tell(trial, None if failed else score, optuna.trial.TrialState.FAIL if failed else None)
