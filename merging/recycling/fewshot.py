"""The yardstick: a small LoRA trained on the very examples that coefficients are tuned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from merging.maths.delta import LowRank
from merging.recycling.experts import FEW_SHOT, Expert
from merging.recycling.journal import Journal
from merging.recycling.places import Beside, attached
from merging.recycling.problem import Mixed, Problem, alone
from merging.recycling.seeds import generator
from merging.recycling.training import Course, Trained, train

__all__ = ["FewShot", "few_shot"]

_SCALE = 2.0
_PATIENCE = 5
"""Validations without a better one, after which a rate is given up: too high ones are tried as well."""


@dataclass(frozen=True, slots=True, eq=False)
class FewShot:
    """The trained LoRA, the rate it was trained with, and what each rate reached: the validation loss."""

    expert: Expert
    mixed: Mixed
    rate: float
    tried: Mapping[float, float]


def few_shot(problem: Problem, modules: Sequence[str], journal: Journal) -> FewShot:
    """A LoRA on the modules that the pool changes, at the rate and step of the lowest validation loss.

    ``A`` starts uniform within ``1/sqrt(in)`` and ``B`` at zero as in PEFT, alpha is twice the rank. There is no
    dropout; stopping by validation takes its place.
    """
    rates = problem.settings.lora_rates
    runs = {rate: _trained(problem, modules, rate, journal) for rate in rates}
    rate = min(rates, key=lambda each: runs[each].loss)
    expert = Expert(FEW_SHOT, _deltas(problem, modules, runs[rate].values))
    mixed = replace(alone(expert).validated(problem), curve=runs[rate].curve)
    return FewShot(expert, mixed, rate, {each: run.loss for each, run in runs.items()})


def _trained(problem: Problem, modules: Sequence[str], rate: float, journal: Journal) -> Trained:
    settings, model = problem.settings, problem.model
    factors: list[Tensor] = []
    for name in modules:
        place, random = model.places[name], generator(settings.seed, FEW_SHOT, name)
        width = min(settings.lora_rank, place.inputs, place.outputs)
        down = (2 * torch.rand(width, place.inputs, generator=random) - 1) / sqrt(place.inputs)
        up = torch.zeros(place.outputs, width)
        factors += [part.to(model.device).requires_grad_(True) for part in (down, up)]
    gates = {name: factors[2 * i].new_full((len(factors[2 * i]),), _SCALE) for i, name in enumerate(modules)}
    dtype = model.dtype

    def running() -> AbstractContextManager[None]:
        beside = {
            name: Beside(factors[2 * i].to(dtype), factors[2 * i + 1].to(dtype), gates[name])
            for i, name in enumerate(modules)
        }
        return attached(model.places, beside)

    course = Course(
        rate=rate,
        steps=settings.lora_steps,
        size=settings.batch,
        micro=settings.micro_batch,
        every=settings.every,
        patience=_PATIENCE,
        seed=settings.seed,
    )
    return train(factors, running, model, problem.learn, problem.valid, course, journal, f"lora {rate:g}")


def _deltas(problem: Problem, modules: Sequence[str], factors: Sequence[Tensor]) -> dict[str, LowRank]:
    found = {}
    for i, name in enumerate(modules):
        place = problem.model.places[name]
        found[name] = LowRank(_SCALE * factors[2 * i + 1], factors[2 * i], place.shape, place.transposed)
    return found
