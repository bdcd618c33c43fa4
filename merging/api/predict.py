"""Predicting a merge from headers alone: its bytes, memory, operations, time and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from merging.api.calibrate import load_rates
from merging.api.merge_files import plan_for
from merging.display.tables import Table, Tabular, format_size, plural
from merging.engine.process_memory import available_memory
from merging.engine.resources import workers_within
from merging.engine.threads import cores
from merging.errors import OptionError, either
from merging.plan import Plan
from merging.plan.prediction.cluster import Cluster, parse_cluster
from merging.plan.prediction.rates import GPU_RATES, Rates
from merging.plan.prediction.work import count_sweeps, count_work
from merging.plan.recipe import Recipe
from merging.type_checks import check_types

__all__ = ["Prediction", "format_flops", "format_seconds", "predict", "predict_plan"]

CACHED = 0.5
"""The share of a node's memory in which the system keeps files between two sweeps."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Prediction(Tabular):
    """The cost of a merge, predicted from headers.

    Attributes:
        nodes: the number of machines.
        workers: the workers of each, or its GPUs.
        sweeps: the number of sweeps over the whole model: for statistics, and the merge.
        read_bytes: the bytes that the merge reads, over all sweeps.
        disk_bytes: the bytes of these that come from the disk, and not from the system's memory.
        write_bytes: the bytes of the output.
        set_aside_bytes: the bytes that are written to the disk meanwhile.
        worker_bytes: the most memory that a worker takes.
        node_bytes: the most memory that all workers of a node take, above the imports.
        decomposition_flops: floating-point operations of decompositions.
        product_flops: floating-point operations of products of low-rank factors.
        processor_seconds: the processor time of all workers together; of GPUs, their time.
        disk_seconds: the time that the disks of the nodes need.
        seconds: the time from the first byte read to the last one written, without starting Python.
        bound: the reason for that time: ``disk``, ``processors``, ``GPUs``, or ``largest tensor``, as one worker merges
            it.
        cost: the price of that time on all nodes; None if no price is given.
        machine: the machine whose rates were measured; empty for default rates.
        notices: remarks for people.
    """

    nodes: int
    workers: int
    sweeps: int
    read_bytes: int
    disk_bytes: int
    write_bytes: int
    set_aside_bytes: int
    worker_bytes: int
    node_bytes: int
    decomposition_flops: float
    product_flops: float
    processor_seconds: float
    disk_seconds: float
    seconds: float
    bound: str
    cost: float | None
    machine: str
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        return {**asdict(self), "notices": list(self.notices)}

    def lines(self) -> list[tuple[str, str]]:
        """Return a name and a text for each fact, for people."""
        nodes = f" on each of {self.nodes} nodes" if self.nodes > 1 else ""
        found = [
            ("sweeps", f"{self.sweeps}, which read {format_size(self.read_bytes)}"),
            ("worker", f"{format_size(self.worker_bytes)} at most for each of {plural(self.workers, 'worker')}{nodes}"),
            ("flops", f"{format_flops(self.decomposition_flops)} of decompositions"),
            ("work", f"{format_seconds(self.processor_seconds)} of processor time"),
            ("time", f"{format_seconds(self.seconds)}, bounded by the {self.bound}"),
        ]
        if self.cost is not None:
            found.append(("cost", f"{self.cost:,.2f}"))
        return found

    def _display_table(self) -> Table:
        return Table("Prediction", rows=self.lines(), notes=self.notices)


@check_types()
def predict(plan: Plan | Recipe, *, cluster: str | Cluster | None = None) -> Prediction:
    """Predict the bytes, memory, time and cost of a merge from headers alone.

    Times are by the rates that ``merge plan --calibrate`` measured on this machine, or else by default rates.

    Args:
        plan: a recipe, or a plan that :func:`~merging.api.merge_files.preview` returned.
        cluster: the machines, as ``"nodes=8,gpus=1,disk=2GB/s,net=25Gb/s,price=2.5"``; this machine by default.

    Returns:
        The prediction, with sizes in bytes and times in seconds.

    Raises:
        MergingError: for models that cannot be merged, and a cluster with unknown keys or wrong units.

    Example:
        >>> import merging
        >>> plan = merging.preview(["one", "two"], method="ties", base="base")
        >>> found = merging.predict(plan, cluster="nodes=2,cores=8,disk=1GB/s")
        >>> found.nodes, found.workers, found.sweeps, found.write_bytes == plan.out_bytes
        (2, 8, 4, True)
    """
    planned = plan_for(plan, None) if isinstance(plan, Recipe) else plan
    return predict_plan(planned, parse_cluster(cluster) if isinstance(cluster, str) else cluster, load_rates())


def predict_plan(plan: Plan, cluster: Cluster | None, rates: Rates, workers: int | None = None) -> Prediction:
    """Predict a plan by rates; ``workers`` is the number of workers on this machine, where no cluster is stated.

    Raises :class:`~merging.errors.OptionError` for a cluster whose nodes have too little memory.
    """
    here, cluster = cluster is None, cluster or Cluster()
    if here:
        workers = workers or workers_within(plan, cores(), None)
        memory = available_memory()
    else:
        workers = cluster.gpus or _workers_of(plan, cluster, rates)
        memory = cluster.memory
    work = count_work(plan)
    read = sum(each.read_bytes * each.sweeps for each in work)
    inputs = sum(each.read_bytes for each in work)
    written, aside = plan.out_bytes, plan.spool_bytes + plan.stage_bytes
    cached = memory is None or inputs / cluster.nodes <= CACHED * memory
    disk_bytes = inputs if cached else read
    seconds = [GPU_RATES.seconds(each) if cluster.gpus else rates.seconds(each) for each in work]
    longest = max((total / each.units for total, each in zip(seconds, work, strict=True)), default=0.0)
    processor = sum(seconds) + (0.0 if cluster.gpus else (disk_bytes + written + aside) * rates.transfer)
    shared = processor / (cluster.nodes * workers)
    disk = (disk_bytes / cluster.rate(rates.read) + (written + aside) / cluster.rate(rates.write)) / cluster.nodes
    bounds = {"disk": disk, "GPUs" if cluster.gpus else "processors": shared, "largest tensor": longest}
    bound = max(bounds, key=lambda name: bounds[name])
    elapsed = bounds[bound]
    return Prediction(
        nodes=cluster.nodes,
        workers=workers,
        sweeps=count_sweeps(plan.recipe.method, len(plan.models)),
        read_bytes=read,
        disk_bytes=disk_bytes,
        write_bytes=written,
        set_aside_bytes=aside,
        worker_bytes=plan.worker_bytes,
        node_bytes=plan.memory(workers),
        decomposition_flops=sum(each.decomposition_flops + each.core_flops + each.compression_flops for each in work),
        product_flops=sum(each.product_flops for each in work),
        processor_seconds=processor,
        disk_seconds=disk,
        seconds=elapsed,
        bound=bound,
        cost=None if cluster.price is None else cluster.price * cluster.nodes * elapsed / 3600,
        machine=rates.machine,
        notices=tuple(_notices(rates, cluster)),
    )


def _workers_of(plan: Plan, cluster: Cluster, rates: Rates) -> int:
    """Return the workers of a node that has no GPU, as its cores and its memory allow."""
    most = cluster.cores or rates.cores
    if cluster.memory is None:
        return most
    if plan.memory(1) > cluster.memory:
        raise OptionError(
            f"cluster: memory = {format_size(cluster.memory)} of a node is too little: this merge needs "
            f"{format_size(plan.memory(1))}"
        )
    return max(1, min(most, int((CACHED * cluster.memory - plan.memory(0)) // max(1, plan.worker_bytes))))


def _notices(rates: Rates, cluster: Cluster) -> list[str]:
    found = []
    if not rates.machine:
        way = either("merge plan --calibrate", "merge plan on the command line")
        found.append(f"times are by default rates: {way} measures this machine in a minute")
    if cluster.gpus:
        found.append("times of GPUs are by assumed rates: no GPU was measured")
    return found


def format_seconds(seconds: float) -> str:
    """Return a time for people: ``0.4 s``, ``12 s``, ``3 min``, ``5.2 h``, ``12 days``."""
    for size, name in ((48 * 3600, "days"), (2 * 3600, "h"), (120, "min")):
        if seconds >= size:
            value = seconds / {"days": 86400, "h": 3600, "min": 60}[name]
            return f"{value:.3g} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def format_flops(operations: float) -> str:
    """Return a number of operations for people: ``5.2 TFLOP``."""
    for size, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if operations >= size:
            return f"{operations / size:.1f} {name}"
    return "0 FLOP" if not operations else f"{operations:.0f} FLOP"
