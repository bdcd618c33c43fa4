"""Weights of checkpoints, held against what they stand for: a run whose learning rate decays, and a moving average."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from merging.errors import OptionError
from merging.soups.schedules import SCHEDULES, Schedule, schedule_weights

EVEN = [500, 600, 700, 800, 900]
UNEVEN = [100, 200, 250, 700, 703]

DECAYS: dict[Schedule, Callable[[float], float]] = {
    "linear": lambda time: 1 - time,
    "cosine": lambda time: 0.5 * (1 + math.cos(math.pi * time)),
    "1-sqrt": lambda time: 1 - time**0.5,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [EVEN, UNEVEN, [7, 9]])
def test_weights_make_a_mean(schedule: Schedule, steps: list[int]) -> None:
    weights = schedule_weights(steps, schedule)
    assert len(weights) == len(steps)
    assert all(weight > 0 for weight in weights)
    assert math.isclose(sum(weights), 1)


@pytest.mark.parametrize("schedule", DECAYS)
@pytest.mark.parametrize("steps", [EVEN, UNEVEN])
def test_a_decay_is_the_same_run_with_a_smaller_learning_rate(schedule: Schedule, steps: list[int]) -> None:
    """The updates of a real run are made again, multiplied by the rate at their time: the same weights come out."""
    random = torch.Generator().manual_seed(1)
    start = torch.randn(6, generator=random, dtype=torch.float64)
    updates = torch.randn(steps[-1] - steps[0], 6, generator=random, dtype=torch.float64)
    run = torch.stack([start + updates[: step - steps[0]].sum(0) for step in steps])
    weights = torch.tensor(schedule_weights(steps, schedule), dtype=torch.float64)
    mean_interval = (steps[-1] - steps[0]) / (len(steps) - 1)
    decayed = start.clone()
    for number, update in enumerate(updates, start=steps[0] + 1):
        saved = min(step for step in steps if step >= number)  # the rate falls from checkpoint to checkpoint
        decayed += DECAYS[schedule]((saved - steps[0]) / (steps[-1] - steps[0] + mean_interval)) * update
    assert torch.allclose(weights @ run, decayed, rtol=0, atol=1e-9)


def test_the_moving_average_is_that_of_the_recursion() -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for decay in (None, 0.3, 0.9):
        average, kept = values[0], 0.8 if decay is None else decay
        for value in values[1:]:
            average = kept * average + (1 - kept) * value
        weights = torch.tensor(schedule_weights(UNEVEN, "ema", decay), dtype=torch.float64)
        assert torch.allclose(weights @ values, average)


def test_with_even_intervals_a_linear_decay_is_the_mean() -> None:
    assert schedule_weights(EVEN, "linear") == pytest.approx(schedule_weights(EVEN, "mean"))
    assert schedule_weights(UNEVEN, "linear") != pytest.approx(schedule_weights(UNEVEN, "mean"))


def test_refused() -> None:
    for decay in (0, 1, -1, math.nan):
        with pytest.raises(OptionError, match="should be between 0 and 1"):
            schedule_weights(EVEN, "ema", decay)
    with pytest.raises(OptionError, match=r'ema_decay=0\.5: is for schedule="ema"'):
        schedule_weights(EVEN, "mean", 0.5)
