"""Carrying out a plan: read by pieces, merge by tiles, write each piece at its place, on all cores or on a GPU.

An item that lies in full is cut into units of work, any other is one unit; workers take them in the order of the
files. Tiles are the same for any number of workers, and sums over them are exact, so the bytes that come out are too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from merging.folds import State
from merging.method import Closing, Round
from merging.plan.items import CHUNK, Plan
from merging.threads import Progress, share_out
from merging.tiles import GPU_TILE
from merging.worker import Shared, Sink, Unit, Worker

__all__ = ["Done", "Sink", "run"]


@dataclass(slots=True)
class Done:
    """What carrying out a plan showed: seconds, remarks, and per module the energy that a lower rank discarded."""

    seconds: float
    notices: list[str]
    discarded: dict[str, float]


def run(
    plan: Plan,
    sink: Sink,
    *,
    device: torch.device | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> Done:
    """Carry out a plan with so many workers, writing to ``sink``.

    Raises :class:`~merging.errors.MergingError` for values that cannot be merged, files that changed under way, and
    what the sink refuses; nothing is left running then.
    """
    began = time.perf_counter()
    device = device or torch.device("cpu")
    shared = Shared(plan, sink, device)
    share = partial(share_out, threads=threads, device=device)
    sweeps = _sweeps(plan)
    units = _units(plan, device)
    merged = [unit for unit in units if unit.item.form != "copy"]
    total = sum(unit.bytes for unit in units) + sum(unit.bytes for unit in merged) * sum(f.fold.sweeps for f in sweeps)
    report = _Counter(progress, total)
    for fold in sweeps:
        _gather(shared, fold, merged, share, report)
    share(units, partial(Worker, shared), Worker.emit, report)
    return Done(time.perf_counter() - began, sorted(shared.notices), shared.discarded)


def _sweeps(plan: Plan) -> list[Round | Closing]:
    rounds: list[Round | Closing] = [each for each in plan.recipe.method.rounds() if each.per == "model"]
    closing = plan.recipe.method.closing(len(plan.models))
    return [*rounds, closing] if closing else rounds


def _units(plan: Plan, device: torch.device) -> list[Unit]:
    method = plan.recipe.method
    whole = method.grain == "matrix" or any(each.per == "tensor" for each in method.rounds())
    chunk = CHUNK if device.type == "cpu" else 4 * GPU_TILE
    units = []
    for item in plan.items:
        step = max(1, item.numel) if (whole or not item.by_chunks) and item.form != "copy" else chunk
        units += [Unit(item, start, min(start + step, item.numel)) for start in range(0, max(1, item.numel), step)]
    return units


class _Counter:
    """Adds up the bytes done over all sweeps for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, unit: Unit) -> None:
        self.done += unit.bytes
        if self.progress:
            self.progress(self.done, self.total)


def _gather(
    shared: Shared, fold: Round | Closing, units: Sequence[Unit], share: Callable[..., list[Worker]], report: _Counter
) -> None:
    """Go through all units as often as a fold needs, and note its result."""
    state = fold.fold.start()
    while True:

        def worker(state: State = state) -> Worker:
            worker = Worker(shared)
            worker.state = state.fork()
            return worker

        for each in share(units, worker, partial(Worker.see, fold=fold), report):
            state.merge(each.state)
        if not state.next():
            break
    shared.seen[fold.name] = state.result()
