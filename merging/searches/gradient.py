"""Coefficients by gradient: a weight for each model and layer, tuned on a loss, or on the entropy of the answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from merging.engine.devices import supply_operations
from merging.engine.in_memory import merge_in_memory
from merging.errors import OptionError, option
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.task_arithmetic import TaskArithmetic
from merging.recycling.seeds import batch
from merging.searches.evaluator import Evaluator
from merging.searches.settings import SearchSettings
from merging.searches.spaces import MergeCandidate

__all__ = ["check_tunable", "tune_by_gradient"]

_START = 0.3
"""The weight that every model begins with in every layer, as in AdaMerging."""

_BATCH = 16
"""Examples of each task in a step."""

_REST = "*"


def check_tunable(evaluator: Evaluator, settings: SearchSettings) -> None:
    """Refuse models without a base, and entropies of language models. Raises :class:`~merging.errors.OptionError`."""
    if not evaluator.merger.based:
        raise OptionError(f"{option('strategy', settings.strategy)} weighs changes from a base: give {option('base')}")
    if settings.strategy == "adamerging" and not all(model.classifies for model in evaluator.models):
        raise OptionError(
            f"{option('strategy', 'adamerging')} makes the answers of classifiers sure: use "
            f"{option('strategy', 'gradient')} for language models"
        )


def tune_by_gradient(evaluator: Evaluator, settings: SearchSettings) -> MergeCandidate:
    """Tune a weight for each model and layer, and return the weighted sum of changes as a candidate.

    ``adamerging`` lowers the mean entropy of the answers on the examples to choose by, without their labels, with
    weights from 0 to 1 (AdaMerging, Yang et al. 2024, arXiv 2310.02575, layer-wise). ``gradient`` lowers their loss,
    with any weights. Adam goes through the merge in memory. Tensors outside the blocks share one weight a model.
    """
    reader, models = evaluator.merger.reader, len(evaluator.merger.inputs.models)
    groups = _group_by_layer(reader.sites)
    entropy = settings.strategy == "adamerging"
    device = torch.device(evaluator.objective.device)
    weights = torch.full((models, len(groups)), _START, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=settings.rate)
    for step in range(settings.steps):
        bound = weights.clamp(0.0, 1.0) if entropy else weights
        merged: dict[str, Tensor] = {}
        with supply_operations(device):
            for column, sites in enumerate(groups.values()):
                method = TaskArithmetic(weights=bound[:, column])
                for name, change, base in merge_in_memory(method, sites, reader.read, False):
                    assert base is not None
                    merged[name] = base + change.dense()
        with evaluator.weights.at(merged):
            total = torch.zeros((), device=device)
            for model, items in zip(evaluator.models, evaluator.valid, strict=True):
                chosen = [items[place] for place in batch(step, min(_BATCH, len(items)), len(items), settings.seed)]
                answers = model.answers(chosen)
                each = answers.entropies(len(chosen)) if entropy else answers.losses(len(chosen))
                total = total + each.mean() / len(evaluator.models)
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    final = weights.detach().clamp(0.0, 1.0) if entropy else weights.detach()
    by_pattern = dict(zip(groups, final.T.cpu().tolist(), strict=True))
    return _as_candidate(by_pattern, settings, models)


def _group_by_layer(sites: Mapping[str, Site]) -> dict[str, dict[str, Site]]:
    """Return the sites of each layer by a pattern of their names, and those outside the blocks last, by ``*``."""
    groups: defaultdict[str, dict[str, Site]] = defaultdict(dict)
    rest: dict[str, Site] = {}
    for name, site in sites.items():
        if site.position.stack is None:
            rest[name] = site
        else:
            groups[f"{site.position.stack}.{site.position.index}.*"][name] = site
    return {**groups, **({_REST: rest} if rest else {})}


def _as_candidate(weights: Mapping[str, Sequence[float]], settings: SearchSettings, models: int) -> MergeCandidate:
    rounded = {pattern: [float(f"{value:.4g}") for value in each] for pattern, each in weights.items()}
    name = f"{settings.strategy}, {len(rounded)} groups of layers"
    parameters = {"weights": rounded}
    return MergeCandidate(name, "task_arithmetic", parameters, tuple(range(models)), settings.strategy)
