"""Carrying out a plan: read by pieces, merge by tiles, write each piece at its place, on all cores or on a GPU.

An item that lies in full is cut into units of work, any other is one unit; workers take them in the order of the
files. Tiles are the same for any number of workers, and sums over them are exact, so the bytes that come out are too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from merging.engine.spool import Spool
from merging.engine.threads import Progress, share_out
from merging.engine.tiles import GPU_TILE, whole_rows
from merging.engine.unit import Unit
from merging.engine.worker import Shared, Sink, Worker
from merging.methods.contract.method import ResultStatistic, Statistic
from merging.os_calls import keep_freed_memory, private_memory, release_freed_memory
from merging.plan.items import CHUNK, TILE, Plan

__all__ = ["Done", "Sink", "run"]


@dataclass(slots=True)
class Done:
    """What carrying out a plan showed: seconds, remarks, and per module the energy that a lower rank discarded.

    ``facts`` are what the method tells of the merge, by name: for what it tells of single tensors the mean.
    """

    seconds: float
    notices: list[str]
    discarded: dict[str, float]
    metrics: dict[str, float]

    @property
    def energy_notice(self) -> str | None:
        """The energy that the rank cuts off the change, if it is worth saying; a warning above a tenth."""
        if not self.discarded or max(self.discarded.values()) < 5e-4:
            return None
        worst, most = max(self.discarded.items(), key=lambda each: each[1])
        mean, warning = fmean(self.discarded.values()), "warning: " if most > 0.1 else ""
        return (
            f"{warning}the rank discards {mean:.1%} of the energy of the change on average, {most:.1%} at worst "
            f"({worst}): raise --rank, or use --as model"
        )


def run(
    plan: Plan,
    sink: Sink,
    *,
    device: torch.device | None = None,
    threads: int = 1,
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> Done:
    """Carry out a plan with so many workers, writing to ``sink``; ``scratch`` is a folder for what is set aside.

    Raises :class:`~merging.errors.MergingError` for values that cannot be merged, files that changed under way, and
    what the sink refuses; nothing is left running then.
    """
    began = time.perf_counter()
    device = device or torch.device("cpu")
    keep_freed_memory()
    shared = Shared(plan, sink, device, Spool(scratch), keeps=plan.kept_bytes > 0)
    share = partial(share_out, threads=threads, device=device)
    most = private_memory() + plan.memory(threads)
    stages = _stages(plan)
    units = _units(plan, device)
    merged = [unit for unit in units if unit.item.form != "copy"]
    sweeps = sum(max(each.reduction.sweeps for each in stage) for stage in stages)
    total = sum(unit.bytes for unit in units) + sum(unit.bytes for unit in merged) * sweeps
    report = _Counter(progress, total, most)
    try:
        for stage in stages:
            _gather(shared, stage, merged, share, report)
        share(units, partial(Worker, shared), Worker.emit, report)
    finally:
        shared.spool.close()
    metrics = {fact: fmean(found[name] for name in sorted(found)) for fact, found in shared.metrics.items()}
    metrics |= plan.recipe.method.metrics(shared.statistics, len(plan.models))
    return Done(time.perf_counter() - began, sorted(shared.notices), shared.discarded, metrics)


def _stages(plan: Plan) -> list[list[Statistic | ResultStatistic]]:
    """The folds over the whole model, those side by side that one sweep can gather."""
    required_statistics: list[list[Statistic | ResultStatistic]] = [
        [each] for each in plan.recipe.method.required_statistics() if each.per == "model"
    ]
    result_statistics = list(plan.recipe.method.result_statistics(len(plan.models)))
    return [*required_statistics, [*result_statistics]] if result_statistics else required_statistics


def _units(plan: Plan, device: torch.device) -> list[Unit]:
    chunk = CHUNK if device.type == "cpu" else 4 * GPU_TILE
    units = []
    for item in plan.items:
        method = plan.recipe.method.at(item.site)
        grain = method.grain_at(item.site)
        whole = grain == "matrix" or any(each.per == "tensor" for each in method.required_statistics())
        step = max(1, item.numel) if (whole or not item.by_chunks) and item.form != "copy" else chunk
        if grain == "row" and step == chunk:
            tile = whole_rows(item, "row", TILE if device.type == "cpu" else GPU_TILE)
            step = max(1, chunk // tile) * tile
        units += [Unit(item, start, min(start + step, item.numel)) for start in range(0, max(1, item.numel), step)]
    return units


class _Counter:
    """Adds up the bytes done over all sweeps for a progress bar, and keeps the process's memory below ``most``."""

    def __init__(self, progress: Progress | None, total: int, most: int) -> None:
        self.progress, self.total, self.most, self.done = progress, total, most, 0

    def __call__(self, unit: Unit) -> None:
        self.done += unit.bytes
        if private_memory() > self.most:
            release_freed_memory()
        if self.progress:
            self.progress(self.done, self.total)


def _gather(
    shared: Shared,
    folds: Sequence[Statistic | ResultStatistic],
    units: Sequence[Unit],
    share: Callable[..., list[Worker]],
    report: _Counter,
) -> None:
    """Go through all units as often as the folds need, and note their results."""
    dtype = shared.plan.widest
    states = [each.reduction.widened(dtype).start() for each in folds]
    while True:

        def worker() -> Worker:
            worker = Worker(shared)
            worker.states = [state.fork() for state in states]
            return worker

        swept = [each.states for each in share(units, worker, partial(Worker.see, folds=folds), report)]
        for gathered in swept:
            for state, part in zip(states, gathered, strict=True):
                state.merge(part)
        release_freed_memory()  # the next sweep has threads of its own, which do not find all that was freed
        unfinished = [state.next() for state in states]  # each of them must be told
        if not any(unfinished):
            break
    for reduction, state in zip(folds, states, strict=True):
        shared.statistics[reduction.name] = state.result()
