"""The weights of checkpoints that stand for a schedule: a mean, a moving average, or a decay of the learning rate.

A decay never happened: the run went on at a constant learning rate, and the weights of its checkpoints do the same to
its updates afterwards (WSM, arXiv 2507.17634)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from merging.errors import OptionError, option

__all__ = ["SCHEDULES", "Schedule", "schedule_weights"]

Schedule = Literal["mean", "ema", "linear", "cosine", "1-sqrt"]

SCHEDULES: tuple[Schedule, ...] = ("mean", "ema", "linear", "cosine", "1-sqrt")

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda time: 1 - time,
    "cosine": lambda time: (1 + math.cos(math.pi * time)) / 2,
    "1-sqrt": lambda time: 1 - math.sqrt(time),
}
"""The learning rate at a time of the decay from 0 to 1, as a share of the rate before."""

_EMA_DECAY = 0.8


def schedule_weights(steps: Sequence[int], schedule: Schedule = "mean", ema_decay: float | None = None) -> list[float]:
    """Return the weight of each checkpoint, with the sum 1.

    A decay multiplies the updates between checkpoint j-1 and j by f(t_j). The result is the mean of the checkpoints
    with the weights f(t_j) - f(t_j+1), where t_0 = 0 and the time behind the last checkpoint is 1. Times follow the
    steps, and one more interval of mean length is behind the last checkpoint: with even intervals, ``linear`` is the
    mean.

    Args:
        steps: the steps of the checkpoints, ascending.
        schedule: ``mean``, ``ema``, or the decay ``linear``, ``cosine`` or ``1-sqrt``.
        ema_decay: of ``ema``, the share of the average that each checkpoint keeps, 0.8 by default; the average begins
            with the first checkpoint.

    Raises:
        OptionError: for a decay that is not between 0 and 1, or that another schedule does not have.
    """
    count = len(steps)
    if ema_decay is not None and schedule != "ema":
        raise OptionError(f"{option('ema_decay', ema_decay)}: is for {option('schedule', 'ema')}")
    if schedule == "mean" or count == 1:
        return [1 / count] * count
    if schedule == "ema":
        decay = _EMA_DECAY if ema_decay is None else ema_decay
        if not 0 < decay < 1:
            raise OptionError(f"{option('ema_decay', decay)}: should be between 0 and 1, such as 0.8")
        return [decay ** (count - 1), *((1 - decay) * decay ** (count - 1 - place) for place in range(1, count))]
    end = (steps[-1] - steps[0]) * count / (count - 1)
    times = [*((step - steps[0]) / end for step in steps), 1.0]
    rates = [_DECAYS[schedule](time) for time in times]
    return [rate - later for rate, later in pairwise(rates)]
