"""The few-shot baseline: a small LoRA trained on the same examples that coefficients are tuned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import sqrt

from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.recycling.hooks import LowRankBranch, attach_branches
from merging.recycling.pool_adapters import FEW_SHOT, Expert
from merging.recycling.problem import Problem, WeightedAdapters, single_adapter
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.recycling.seeds import generator
from merging.recycling.training import TrainingPlan, TrainingResult, train

__all__ = ["FewShot", "train_few_shot"]

_SCALE = 2.0
_PATIENCE = 5
"""Validations without improvement after which a learning rate is given up."""


@dataclass(frozen=True, slots=True, eq=False)
class FewShot:
    """The trained LoRA, its learning rate, and the validation loss that each rate reached."""

    expert: Expert
    mixed: WeightedAdapters
    rate: float
    tried: Mapping[float, float]


def train_few_shot(problem: Problem, modules: Sequence[str], checkpoint: RunCheckpoint) -> FewShot:
    """Train a LoRA on the modules that the pool changes, and return it at the lowest validation loss of all rates.

    As in PEFT, ``A`` starts uniform within ``1/sqrt(in)`` and ``B`` at zero. Alpha is twice the rank. Early stopping
    replaces dropout.
    """
    rates = problem.settings.lora_rates
    runs = {rate: _train(problem, modules, rate, checkpoint) for rate in rates}
    rate = min(rates, key=lambda each: runs[each].loss)
    expert = Expert(FEW_SHOT, _deltas(problem, modules, runs[rate].values))
    mixed = replace(single_adapter(expert).validate(problem), curve=runs[rate].curve)
    return FewShot(expert, mixed, rate, {each: run.loss for each, run in runs.items()})


def _train(problem: Problem, modules: Sequence[str], rate: float, checkpoint: RunCheckpoint) -> TrainingResult:
    settings, model = problem.settings, problem.model
    factors: list[Tensor] = []
    for name in modules:
        point, random = model.hook_points[name], generator(settings.seed, FEW_SHOT, name)
        width = min(settings.lora_rank, point.inputs, point.outputs)
        down = (2 * torch.rand(width, point.inputs, generator=random) - 1) / sqrt(point.inputs)
        up = torch.zeros(point.outputs, width)
        factors += [part.to(model.device).requires_grad_(True) for part in (down, up)]
    gates = {name: factors[2 * i].new_full((len(factors[2 * i]),), _SCALE) for i, name in enumerate(modules)}
    dtype = model.dtype

    def running() -> AbstractContextManager[None]:
        branches = {
            name: LowRankBranch(factors[2 * i].to(dtype), factors[2 * i + 1].to(dtype), gates[name])
            for i, name in enumerate(modules)
        }
        return attach_branches(model.hook_points, branches)

    plan = TrainingPlan(
        rate=rate,
        steps=settings.lora_steps,
        size=settings.batch,
        micro=settings.micro_batch,
        every=settings.every,
        patience=_PATIENCE,
        seed=settings.seed,
    )
    return train(factors, running, problem=problem, plan=plan, checkpoint=checkpoint, stage=f"lora {rate:g}")


def _deltas(problem: Problem, modules: Sequence[str], factors: Sequence[Tensor]) -> dict[str, LowRank]:
    found = {}
    for i, name in enumerate(modules):
        point = problem.model.hook_points[name]
        found[name] = LowRank(_SCALE * factors[2 * i + 1], factors[2 * i], point.shape, point.transposed)
    return found
