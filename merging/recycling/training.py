"""Training a few numbers on few examples: AdamW, a warm cosine, the best by validation loss, resumable at each one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import cos, inf, isfinite, pi
from typing import Any

import torch
from torch import Tensor

from merging.recycling.journal import Journal
from merging.recycling.model import Item, TaskModel
from merging.recycling.seeds import batch

__all__ = ["Course", "Trained", "train"]

_WARM_UP = 0.1

Running = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Course:
    """How training goes: ``size`` examples a step, ``micro`` of them through the model at once.

    ``entropy`` asks for sure answers instead of right ones, ``bounds`` are kept after each step, ``l1`` weighs the mean
    size of the numbers, and training stops after ``patience`` validations without a better one.
    """

    rate: float
    steps: int
    size: int = 8
    micro: int = 8
    every: int = 10
    patience: int = 20
    entropy: bool = False
    bounds: tuple[float, float] | None = None
    l1: float = 0.0
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: up in the first tenth of them, then down a cosine."""
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + cos(pi * (step - warm) / max(1, self.steps - warm)))


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The numbers with the lowest validation loss, that loss, and the curve: step, training loss, validation loss.

    The curve begins at step 0, before any training, so that what comes back is never worse than the start.
    """

    values: tuple[Tensor, ...]
    loss: float
    curve: tuple[tuple[int, float, float | None], ...]


def train(
    parameters: Sequence[Tensor],
    running: Running,
    model: TaskModel,
    learn: Sequence[Item],
    valid: Sequence[Item],
    course: Course,
    journal: Journal,
    stage: str,
) -> Trained:
    """Train ``parameters`` in place; the network depends on them while ``running()``.

    After every validation the state is kept in the journal: a run that goes on from there ends the same. Validation is
    by the labels' loss, also where entropy is what is trained.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=course.rate, betas=(0.9, 0.999), weight_decay=0.0)
    state = journal.get(stage) or _begun(parameters, _validated(running, model, valid))
    if not state["done"] and state["step"]:
        optimizer.load_state_dict(state["optimizer"])
        for parameter, value in zip(parameters, state["values"], strict=True):
            parameter.data.copy_(value)
    while not state["done"]:
        told = [_step(parameters, running, model, learn, course, optimizer, step) for step in _until(state, course)]
        state["step"] += len(told)
        loss = _validated(running, model, valid)
        state["curve"].append((state["step"], sum(told) / len(told), loss))
        if loss < state["loss"]:
            state.update(loss=loss, best=_copies(parameters), stale=0)
        else:
            state["stale"] += 1
        lost = not all(bool(parameter.isfinite().all()) for parameter in parameters)
        state["done"] = state["step"] == course.steps or state["stale"] == course.patience or lost
        now = {"values": [], "optimizer": {}} if state["done"] else _now(parameters, optimizer)
        state.update(now)
        journal.keep(stage, state)
    return Trained(tuple(state["best"]), state["loss"], tuple(tuple(point) for point in state["curve"]))


def _begun(parameters: Sequence[Tensor], loss: float) -> dict[str, Any]:
    return {
        "step": 0,
        "done": False,
        "loss": loss,
        "best": _copies(parameters),
        "stale": 0,
        "curve": [(0, loss, loss)],
    }


def _now(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"values": _copies(parameters), "optimizer": optimizer.state_dict()}


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in parameters]


def _until(state: dict[str, Any], course: Course) -> range:
    """The steps up to the next validation."""
    return range(state["step"], min(course.steps, state["step"] + course.every))


def _validated(running: Running, model: TaskModel, valid: Sequence[Item]) -> float:
    with running(), torch.no_grad():
        loss = model.scores(valid).loss
    return loss if isfinite(loss) else inf


def _step(
    parameters: Sequence[Tensor],
    running: Running,
    model: TaskModel,
    learn: Sequence[Item],
    course: Course,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> float:
    """One step, and the loss before it."""
    chosen = [learn[i] for i in batch(step, min(course.size, len(learn)), len(learn), course.seed)]
    optimizer.zero_grad()
    total = 0.0
    for start in range(0, len(chosen), course.micro):
        part = chosen[start : start + course.micro]
        with running():
            said = model.answers(part)
        each = said.entropies(len(part)) if course.entropy else said.losses(len(part))
        loss = each.sum() / len(chosen)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if course.l1:
        size = course.l1 * sum(p.abs().sum() for p in parameters) / sum(p.numel() for p in parameters)
        size.backward()  # type: ignore[union-attr]
    optimizer.param_groups[0]["lr"] = course.rate_at(step)
    optimizer.step()
    if course.bounds:
        for parameter in parameters:
            parameter.data.clamp_(*course.bounds)
    return total
