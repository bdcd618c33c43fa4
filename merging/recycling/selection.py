"""Select the adapters to mix: score all of a pool, one at a time, and take the best that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite

from merging.cluster import RayCluster
from merging.engine.evaluation import evaluate_each
from merging.errors import OptionError
from merging.hub.open_model import open_model
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.sums import safe_ratio
from merging.recycling.hooks import HookPoint
from merging.recycling.pool_adapters import AdapterRef, Expert, open_expert, read_expert
from merging.recycling.problem import Problem, single_adapter
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.recycling.seeds import order
from merging.recycling.similarity import cosine, similarity
from merging.sources import Model

__all__ = ["ChosenAdapters", "Workers", "choose", "gains", "gradients", "score_candidates", "spearman"]

_DUPLICATE = 0.9999

_GRADIENT_BYTES = 4 << 30
"""Most memory for gradients of the base's weights at a time; a larger model takes several passes."""


@dataclass(frozen=True, slots=True, eq=False)
class ChosenAdapters:
    """The adapters to mix, best first, the score of every candidate, and why better candidates were passed over."""

    experts: tuple[Expert, ...]
    scores: dict[str, float]
    passed_over: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workers:
    """A cluster whose workers score adapters, and a function that loads the problem for ``base`` in each of them."""

    cluster: RayCluster
    load: Callable[[], Problem]
    base: str


def score_candidates(
    pool: Sequence[AdapterRef],
    problem: Problem,
    target: Expert | None,
    checkpoint: RunCheckpoint,
    workers: Workers | None = None,
) -> dict[str, float]:
    """Score each candidate by the strategy of the settings. Better adapters have larger scores."""
    kind = problem.settings.select
    kept: dict[str, float] = checkpoint.get("selection") or {}
    if kind == "random":
        positions = order(len(pool), problem.settings.seed, "selection")
        return {each.name: float(-position) for each, position in zip(pool, positions, strict=True)}
    waiting = [each for each in pool if each.name not in kept]
    if waiting:
        tasks = ((each, (each, open_model(each.path))) for each in waiting)
        prepare = partial(_prepare, workers.load if workers else lambda: problem, target)
        cluster, models = (workers.cluster, [workers.base]) if workers else (None, [])
        with closing(evaluate_each(tasks, prepare, cluster, models=models)) as results:
            for each, score in results:
                kept[each.name] = score
                checkpoint.keep("selection", kept)
    return kept


def _prepare(load: Callable[[], Problem], target: Expert | None) -> Callable[[tuple[AdapterRef, Model]], float]:
    """Return the function that scores one candidate, with the gradients that it needs."""
    problem = load()
    grads = gradients(problem) if problem.settings.select == "screen" else {}

    def score(task: tuple[AdapterRef, Model]) -> float:
        expert = read_expert(*task, problem.model.hook_points)
        return _score(problem.settings.select, expert, problem, target, grads)

    return score


def _score(kind: str, expert: Expert, problem: Problem, target: Expert | None, grads: dict[str, Tensor]) -> float:
    if kind == "evaluation":
        loss = single_adapter(expert).scores(problem, problem.shots).loss
        return -loss if isfinite(loss) else -inf
    if kind == "screen":
        return safe_ratio(-sum(gains(expert, grads).values()), expert.norm)
    if kind == "rank":
        return float(expert.rank)
    assert target is not None
    return similarity(expert.deltas, target.deltas, kind)


def choose(
    pool: Sequence[AdapterRef], scores: dict[str, float], problem: Problem, taken: Sequence[Expert] = ()
) -> ChosenAdapters:
    """Choose the best candidates: at most ``k``, at most ``owner_cap`` of an owner, and no two with the same changes.

    The adapters in ``taken`` are mixed in anyway, and candidates that equal them are passed over. Of equal scores the
    first name wins.
    """
    settings = problem.settings
    experts: list[Expert] = []
    owners: Counter[str] = Counter()
    passed_over: dict[str, str] = {}
    for each in sorted(pool, key=lambda candidate: (-scores[candidate.name], candidate.name)):
        if len(experts) == settings.k:
            break
        if each.owner and settings.owner_cap and owners[each.owner] == settings.owner_cap:
            passed_over[each.name] = f"{each.owner} has {settings.owner_cap} among the chosen"
            continue
        expert = open_expert(each, problem.model.hook_points)
        twin = next((one for one in (*taken, *experts) if settings.dedupe and _same(one, expert)), None)
        if twin is not None:
            passed_over[each.name] = f"changes the same as {twin.name}"
            continue
        experts.append(expert)
        owners.update([each.owner] if each.owner else [])
    return ChosenAdapters(tuple(experts), scores, passed_over)


def _same(one: Expert, other: Expert) -> bool:
    return one.deltas.keys() == other.deltas.keys() and cosine(one.deltas, other.deltas) > _DUPLICATE


def gradients(problem: Problem, most: int = _GRADIENT_BYTES) -> dict[str, Tensor]:
    """Return ``G = dL/dW0`` of the mean training loss for every hook point's weight, float32, in the weight's layout.

    This takes one forward and backward pass over the examples, or several if the gradients need more than ``most``
    bytes. The gradient of a tied weight counts both uses.
    """
    found: dict[str, Tensor] = {}
    for group in _groups(problem.model.hook_points, most):
        found |= _accumulate(problem, group)
    return found


def _groups(points: dict[str, HookPoint], most: int) -> list[dict[str, HookPoint]]:
    groups: list[dict[str, HookPoint]] = [{}]
    size = 0
    for name, point in points.items():
        needed = 4 * point.inputs * point.outputs
        if groups[-1] and size + needed > most:
            groups.append({})
            size = 0
        groups[-1][name] = point
        size += needed
    return groups


def _accumulate(problem: Problem, group: dict[str, HookPoint]) -> dict[str, Tensor]:
    model, step = problem.model, problem.settings.micro_batch
    weights = {name: point.weight for name, point in group.items()}
    sums = {name: torch.zeros(weight.shape, device=weight.device) for name, weight in weights.items()}
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise OptionError("select = screen: needs the gradients of the base's weights, and these are quantised")
    unique = list({id(weight): weight for weight in weights.values()}.values())
    for weight in unique:
        weight.requires_grad_(True)
    try:
        for start in range(0, len(problem.learn), step):
            items = problem.learn[start : start + step]
            loss = model.answers(items).losses(len(items)).sum() / len(problem.learn)
            if not loss.requires_grad:  # no weight of the group has a part in the answers, as with an unused pooler
                break
            for weight, grad in zip(unique, torch.autograd.grad(loss, unique, allow_unused=True), strict=True):
                for name in [name for name, each in weights.items() if each is weight and grad is not None]:
                    sums[name] += grad.float()
    finally:
        for weight in unique:
            weight.requires_grad_(False)
    return sums


def gains(expert: Expert, grads: dict[str, Tensor]) -> dict[str, float]:
    """Return ``<D, G>`` of each module: the gradient of its coefficient at zero. Negative values are good."""
    found = {}
    for name, delta in expert.deltas.items():
        grad = grads[name].mT if delta.transposed else grads[name]
        up, down = delta.up.to(grad.device), delta.down.to(grad.device)
        found[name] = float(((up.mT @ grad) * down).sum())
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the rank correlation of two scores of the same things. None for fewer than three, or constant scores."""
    if len(one) < 3:
        return None
    ranks = [torch.tensor(_ranks(values), dtype=torch.float64) for values in (one, other)]
    if any(bool((each == each[0]).all()) for each in ranks):
        return None
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks. Equal values share the mean of their ranks."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]
