"""Training of few parameters on few examples: AdamW, a cosine with warm-up, early stopping, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import cos, inf, isfinite, pi
from typing import Any

from merging.maths.lazy_torch import Tensor, torch
from merging.recycling.problem import Problem
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.recycling.seeds import batch

__all__ = ["TrainingPlan", "TrainingResult", "train"]

_WARM_UP = 0.1

Running = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The hyperparameters of a training.

    Attributes:
        rate: The largest learning rate.
        steps: The number of steps.
        size: The examples of a step.
        micro: The examples in one forward pass.
        every: The steps between validations.
        patience: The validations without improvement after which training stops.
        entropy: Whether the entropy of the predictions is minimized instead of the labels' loss.
        bounds: The range to which parameters are clamped after each step.
        l1: The weight of the parameters' mean absolute value in the objective.
        seed: The seed of the examples' order.
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
        """Return the learning rate of a step: linear warm-up in the first tenth of all steps, then a cosine to zero."""
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + cos(pi * (step - warm) / max(1, self.steps - warm)))


@dataclass(frozen=True, slots=True, eq=False)
class TrainingResult:
    """The parameters with the lowest validation loss, that loss, and the curve: step, training and validation loss.

    The curve begins at step 0, before any training, so that the result is never worse than the start.
    """

    values: tuple[Tensor, ...]
    loss: float
    curve: tuple[tuple[int, float, float | None], ...]


def train(
    parameters: Sequence[Tensor],
    running: Running,
    *,
    problem: Problem,
    plan: TrainingPlan,
    checkpoint: RunCheckpoint,
    stage: str,
) -> TrainingResult:
    """Train parameters in place, and return them at the lowest validation loss.

    After every validation the state is kept in the checkpoint: a resumed run ends the same. Validation uses the labels'
    loss, also where entropy is trained.

    Args:
        parameters: The tensors to train.
        running: Returns a context in which the network depends on the parameters.
        problem: The model, with training and validation examples.
        plan: The hyperparameters.
        checkpoint: The folder of the run.
        stage: The name of the training in the folder.
    """
    training = _Training(tuple(parameters), running, problem, plan)
    optimizer = torch.optim.AdamW(list(parameters), lr=plan.rate, betas=(0.9, 0.999), weight_decay=0.0)
    state = checkpoint.get(stage) or _first_state(parameters, training.validation_loss())
    if not state["done"] and state["step"]:
        optimizer.load_state_dict(state["optimizer"])
        for parameter, value in zip(parameters, state["values"], strict=True):
            parameter.data.copy_(value)
    while not state["done"]:
        losses = [training.step(optimizer, number) for number in _until(state, plan)]
        state["step"] += len(losses)
        loss = training.validation_loss()
        state["curve"].append((state["step"], sum(losses) / len(losses), loss))
        if loss < state["loss"]:
            state.update(loss=loss, best=_copies(parameters), stale=0)
        else:
            state["stale"] += 1
        diverged = not all(bool(parameter.isfinite().all()) for parameter in parameters)
        state["done"] = state["step"] == plan.steps or state["stale"] == plan.patience or diverged
        state.update({"values": [], "optimizer": {}} if state["done"] else _current_state(parameters, optimizer))
        checkpoint.keep(stage, state)
    return TrainingResult(tuple(state["best"]), state["loss"], tuple(tuple(point) for point in state["curve"]))


@dataclass(frozen=True, slots=True, eq=False)
class _Training:
    """Parameters, the context in which the network depends on them, the task, and the hyperparameters."""

    parameters: tuple[Tensor, ...]
    running: Running
    problem: Problem
    plan: TrainingPlan

    def validation_loss(self) -> float:
        with self.running(), torch.no_grad():
            loss = self.problem.model.scores(self.problem.valid).loss
        return loss if isfinite(loss) else inf

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> float:
        """Do one step, and return the loss before it."""
        plan, learn = self.plan, self.problem.learn
        chosen = [learn[i] for i in batch(number, min(plan.size, len(learn)), len(learn), plan.seed)]
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(chosen), plan.micro):
            part = chosen[start : start + plan.micro]
            with self.running():
                answers = self.problem.model.answers(part)
            each = answers.entropies(len(part)) if plan.entropy else answers.losses(len(part))
            loss = each.sum() / len(chosen)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        if plan.l1:
            absolute = sum((each.abs().sum() for each in self.parameters), torch.zeros(()))
            torch.autograd.backward(plan.l1 * absolute / sum(each.numel() for each in self.parameters))
        optimizer.param_groups[0]["lr"] = plan.rate_at(number)
        optimizer.step()
        if plan.bounds:
            for parameter in self.parameters:
                parameter.data.clamp_(*plan.bounds)
        return total


def _first_state(parameters: Sequence[Tensor], loss: float) -> dict[str, Any]:
    return {
        "step": 0,
        "done": False,
        "loss": loss,
        "best": _copies(parameters),
        "stale": 0,
        "curve": [(0, loss, loss)],
    }


def _current_state(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"values": _copies(parameters), "optimizer": optimizer.state_dict()}


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in parameters]


def _until(state: dict[str, Any], plan: TrainingPlan) -> range:
    """Return the steps up to the next validation."""
    return range(state["step"], min(plan.steps, state["step"] + plan.every))
