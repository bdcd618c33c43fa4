"""Results of workers in another process, joined as those of threads are."""

from __future__ import annotations

import pickle
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import merging
from merging.cluster import Parcel, RayCluster
from merging.engine.cluster_crew import ClusterCrew
from merging.engine.crews import Decomposing, Gathering
from merging.engine.decomposition import Decomposition
from merging.engine.remote_work import Batch
from merging.engine.spool import Spool
from merging.engine.sweeps import SweepPart, Sweeps
from merging.engine.threads import share_out
from merging.engine.unit import Span
from merging.engine.worker import Shared
from merging.maths.reductions import Sum
from merging.plan.rank_settings import RankSettings
from merging.storage.quantizing_writer import QuantizingWriter
from support.tiny import adapters, checkpoint


class Nowhere:
    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        raise AssertionError(name)


def elsewhere(work: Any) -> Any:
    """Return the work as another process receives it."""
    make, arguments = work.__reduce__()
    return make(*pickle.loads(pickle.dumps(arguments)))


def test_all_threads_of_another_process_decompose(tmp_path: Path) -> None:
    plan = merging.preview(adapters(tmp_path, 2)[1], method="linear", rank=RankSettings(energy=0.9))
    spans = [Span(item, 0, item.numel) for item in plan.items if item.form != "copy"]
    found = Decomposition(plan, Spool(tmp_path, tmp_path / "one.spool"))
    work = Decomposing(found)
    there = elsewhere(work)
    shared = Shared(plan, Nowhere(), (), Spool(tmp_path, tmp_path / "other.spool"), keeps=False)

    def do(worker: Any, span: Span) -> None:
        there.do(worker, span)
        time.sleep(0.1)  # the next one is for the other thread

    workers = share_out(spans, partial(there.begin, shared), do, lambda span: None, threads=2)
    work.receive([there.collect(worker) for worker in workers], spans)
    assert len(workers) == 2
    assert found.spectra.keys() == found.spool.places().keys() == {span.item.site.name for span in spans}
    assert all(found.choose_ranks().values())
    for spool in (found.spool, there.spool):
        spool.close()


def test_pieces_of_a_code_stay_in_one_process_when_a_worker_dies(tmp_path: Path) -> None:
    plan = merging.preview(checkpoint(tmp_path, 2)[1], method="linear", quantize="fp8-channel")
    assert plan.quantized is not None
    name = next(iter(plan.quantized.encodings))
    number = next(number for number, item in enumerate(plan.items) if item.site.name == name)
    units = ((number, 0, 10), (number, 10, 20), (number + 1, 0, 5), (number + 1, 5, 9))
    parcel = Parcel("key", None)
    batch = Batch(run=parcel, sweep=parcel, units=units, machine="", versions={})
    codes = QuantizingWriter(Nowhere(), plan.quantized.encodings)
    for sink, wanted in ((codes, [units[:2], units[2:]]), (Nowhere(), [(unit,) for unit in units])):
        crew = ClusterCrew(RayCluster(), 1, Shared(plan, sink, (), Spool(tmp_path), keeps=False))
        assert [part.units for part in crew._split(batch)] == wanted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_values_of_a_gpu_are_gathered_on_the_host(device: str) -> None:
    sweeps = Sweeps(["sum"], [Sum().start()])
    there = elsewhere(Gathering([], sweeps, {}, None))
    (sums,) = [each.fork() for each in there.empty]
    sums.add(torch.ones(2, 3), "a")
    worker = SimpleNamespace(accumulators=[sums], tiler=SimpleNamespace(device=torch.device(device)))
    part = there.collect(worker)
    assert isinstance(part, SweepPart) and (part.accumulators[0] is sums) == (device == "cpu")
    assert part.accumulators[0].result().tolist() == [3, 3]
