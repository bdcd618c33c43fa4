"""Measuring the rates of this machine, by which merges are predicted; they are kept in the user's cache folder."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from merging.api.calibration_models import WRITTEN, write_models
from merging.engine.run import run
from merging.engine.threads import cores
from merging.errors import FormatError, MergingError, OutputError
from merging.maths.lazy_torch import Tensor, torch
from merging.methods import METHODS, chain
from merging.methods.contract.wrapper import Wrapper
from merging.os_calls import begin_writeback
from merging.plan import make_plan
from merging.plan.rates import DEFAULT, MethodRates, Rates
from merging.plan.recipe_values import make_recipe
from merging.plan.work import count_work
from merging.sources.small_files import read_json
from merging.storage.atomic import make_parents, replace_file
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter

__all__ = ["calibrate", "load_rates", "rates_path", "save_rates"]

BUDGET = 50.0
"""Seconds after which the methods that are left keep their default rates, so that it takes a minute at most."""

ENOUGH = 0.3
"""Processor seconds of a merge that is not measured a second time."""

DISK = 128 << 20
"""Bytes that are written and read to measure the disk."""

PLAIN = "task_arithmetic"
"""The method whose rates are subtracted from a wrapper around it, and taken for tensors that are not decomposed."""

PIECE = 2 << 20
"""Bytes of a file that are written or read at a time."""


def rates_path() -> Path:
    """Return the file with the rates of this machine, in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "merging", "rates.json")


def load_rates() -> Rates:
    """Return the rates that were measured on this machine, or else the default rates.

    Raises:
        FormatError: for a file of rates that is damaged.
    """
    path = rates_path()
    if not path.exists():
        return DEFAULT
    found = read_json(path, given=True)
    try:
        methods = {name: MethodRates(**values) for name, values in found.pop("methods").items()}
        return Rates(**found, methods=methods)
    except (TypeError, KeyError, AttributeError):
        raise FormatError(f"{path}: holds no rates of this version: run merge plan --calibrate again") from None


def save_rates(rates: Rates) -> Path:
    """Write rates to the user's cache folder, and return the file. Raises :class:`~merging.errors.OutputError`."""
    path = rates_path()
    try:
        make_parents(path)
        replace_file(path, json.dumps(asdict(rates), indent=1).encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def calibrate(folder: Path | None = None) -> Rates:
    """Measure the rates of this machine, in a minute at most.

    Args:
        folder: the folder on whose disk the rates are measured; the working folder by default.

    Returns:
        The rates. Methods for which no time was left have default rates.

    Raises:
        OutputError: if the folder cannot be written to.
    """
    end = time.perf_counter() + BUDGET
    folder = folder or Path()
    try:
        with tempfile.TemporaryDirectory(prefix=".merging-calibrate-", dir=folder) as scratch:
            rates = _measure_disk(Path(scratch))
            write_models(Path(scratch))
            bench = _Bench(Path(scratch))
            methods = {PLAIN: bench.rates_of(PLAIN, None)}
            for name in METHODS:
                if name in methods or time.perf_counter() > end:
                    continue
                try:
                    methods[name] = bench.rates_of(name, methods[PLAIN])
                except MergingError:  # a method that needs parameters, which has the default rates
                    continue
            product = bench.product(methods[PLAIN])
    except OSError as error:
        raise OutputError(f"{folder}: its disk cannot be measured: {error.strerror}") from None
    return replace(
        rates,
        machine=platform.node() or "this machine",
        measured=date.today().isoformat(),
        folder=str(folder.absolute()),
        cores=cores(),
        product=product,
        methods=methods,
    )


def _measure_disk(folder: Path) -> Rates:
    """Return rates of reading and writing a file on a disk, past the system's memory where it lets one."""
    out = OutputTensor("values", "U8", (DISK,))
    piece = torch.randint(0, 256, (PIECE,), dtype=torch.uint8)
    copies, writes = [], []
    for name in ("first", "second"):
        writer = TensorWriter(folder, name, [out], {}, None)
        began, processor = time.perf_counter(), time.process_time()
        for start in range(0, DISK, PIECE):
            writer.write("values", piece, start)
        copies.append((time.process_time() - processor) / DISK)
        writer.finish()
        writes.append(DISK / (time.perf_counter() - began))
    with (folder / "first.safetensors").open("rb") as file:
        begin_writeback(file.fileno(), 0, 0)  # has the system forget the file's pages, as they are on the disk
        began = time.perf_counter()
        while file.read(PIECE):
            pass
        read = DISK / (time.perf_counter() - began)
    return Rates(read=read, write=max(writes), copy=min(copies))


class _NullSink:
    """A sink that drops all values."""

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Drop values."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """The processor seconds of a merge, and its work in sums over all items."""

    seconds: float
    passes: int
    elements: int
    flops: float
    core_flops: float
    product_flops: float


class _Bench:
    """Merges small models in memory, and measures processor seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rates_of(self, name: str, plain: MethodRates | None) -> MethodRates:
        """Return the rates of a method; ``plain`` has the rates of the method inside a wrapper."""
        method = chain(name)
        wrapper = isinstance(method, Wrapper)
        inside = plain if wrapper and plain is not None else MethodRates(item=0.0, element=0.0)
        tiny = self.measure(name, "tiny")
        item = tiny.seconds / tiny.passes
        if any(link.decomposed_side for link in method.links()):
            return self._decomposing(name, max(0.0, item - inside.item), inside, plain)
        wide = self.measure(name, "wide")
        element = max(0.0, wide.seconds - item * wide.passes) / wide.elements if wide.elements else 0.0
        return MethodRates(item=max(0.0, item - inside.item), element=max(0.0, element - inside.element))

    def _decomposing(self, name: str, item: float, inside: MethodRates, plain: MethodRates | None) -> MethodRates:
        """Return the rates of a method that decomposes matrices, and goes through other tensors as the plain one."""
        element = plain.element if plain is not None and not inside.element else 0.0
        full, factors = self.measure(name, "square"), self.measure(name, "lora")
        rest = element + inside.element
        flop = max(0.0, full.seconds - rest * full.elements) / full.flops if full.flops else 0.0
        core = max(0.0, factors.seconds - rest * factors.elements) / factors.core_flops if factors.core_flops else 0.0
        return MethodRates(item=item, element=element, flop=flop, core=core)

    def product(self, plain: MethodRates) -> float:
        """Return the processor seconds of an operation of a product of factors, from adapters added to their base."""
        found = self.measure(PLAIN, "lora", kind="model")
        return max(0.0, found.seconds - plain.element * found.elements) / found.product_flops

    def measure(self, name: str, models: str, **options: Any) -> _Measured:
        """Merge models by a method with its defaults, and return the time; the shorter one of two short times."""
        method = chain(name)
        most = min(link.models[1] or len(WRITTEN) for link in method.links())
        paths = [str(self.folder / f"{models}-{each}") for each in WRITTEN[:most]]
        paths = [f"{path}.safetensors" if models != "lora" else path for path in paths]
        needs_base = method.merge_space == "delta" and (models != "lora" or options)
        base = {"base": str(self.folder / f"{'square' if models == 'lora' else models}-base.safetensors")}
        recipe = make_recipe(
            {"models": paths, "method": name, "parameters": {}, **(base if needs_base else {}), **options}, "calibrate"
        )
        plan = make_plan(recipe)
        work = count_work(plan)
        seconds: list[float] = []
        while sum(seconds) < ENOUGH and len(seconds) < 2:
            began = time.process_time()
            run(plan, _NullSink(), threads=cores())
            seconds.append(time.process_time() - began)
        return _Measured(
            seconds=min(seconds),
            passes=sum(each.sweeps for each in work),
            elements=sum(each.elements for each in work),
            flops=sum(each.decomposition_flops for each in work),
            core_flops=sum(each.core_flops for each in work),
            product_flops=sum(each.product_flops for each in work),
        )
