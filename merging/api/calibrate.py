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
from statistics import median
from typing import Any

from merging.api.calibration_models import WRITTEN, write_models
from merging.api.merge_files import merge_plan
from merging.engine.run import run
from merging.engine.threads import cores
from merging.errors import FormatError, MergingError, OutputError
from merging.file_ranges import forget
from merging.maths.lazy_torch import Tensor, torch
from merging.methods import METHODS, chain
from merging.methods.contract.wrapper import Wrapper
from merging.plan import make_plan
from merging.plan.prediction.rates import DEFAULT, MethodRates, Rates
from merging.plan.prediction.work import count_work
from merging.plan.recipe_values import make_recipe
from merging.sources.small_files import read_json
from merging.storage.atomic import make_parents, replace_file
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter

__all__ = ["calibrate", "load_rates", "rates_path", "save_rates"]

BUDGET = 50.0
"""Seconds after which the methods that are left keep their default rates, so that it takes a minute at most."""

ENOUGH = 0.3
"""Processor seconds of a merge that is not measured a second time."""

DISK = 96 << 20
"""Bytes of a file that is written and read to measure the disk."""

LARGE = ("disk-a", "disk-b", "disk-c")
"""The files that are written and read to measure the disk."""

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
        raise FormatError(f"{path}: holds no rates of this version: calibrate again") from None


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
            plain = bench.rates_of(PLAIN, None)
            methods = {PLAIN: plain}
            methods["linear"] = bench.rates_of("linear", None)
            transfer = _measure_transfer(Path(scratch), methods["linear"])
            product, compression = bench.product(plain), bench.compression(plain)
            for name in METHODS:
                if name in methods or time.perf_counter() > end:
                    continue
                try:
                    methods[name] = bench.rates_of(name, plain)
                except MergingError:  # a method that needs parameters, which has the default rates
                    continue
    except OSError as error:
        raise OutputError(f"{folder}: its disk cannot be measured: {error.strerror}") from None
    return replace(
        rates,
        machine=platform.node() or "this machine",
        measured=date.today().isoformat(),
        folder=str(folder.absolute()),
        cores=cores(),
        transfer=transfer,
        product=product,
        compression=compression,
        methods=methods,
    )


def _measure_disk(folder: Path) -> Rates:
    """Return rates of writing and reading files on a disk, medians of a few, past the system's memory if it can be."""
    out = OutputTensor("values", "BF16", (DISK // 2,))
    piece = torch.randn(PIECE // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for name in LARGE:
        writer = TensorWriter(folder, name, [out], {"format": "pt"}, None)
        began = time.perf_counter()
        for start in range(0, DISK // 2, PIECE // 2):
            writer.write("values", piece, start)
        writer.finish()
        write = DISK / (time.perf_counter() - began)
        path = folder / f"{name}.safetensors"
        _forget(path)
        with path.open("rb", buffering=0) as file:
            began = time.perf_counter()
            while file.read(PIECE):
                pass
        found.append((DISK / (time.perf_counter() - began), write))
        _forget(path)
    read, write = (median(values) for values in zip(*found, strict=True))
    return Rates(read=read, write=write)


def _forget(path: Path) -> None:
    """Have the system forget the pages of a file that is on the disk, where it does so."""
    with path.open("rb") as file:
        forget(file.fileno())


def _measure_transfer(folder: Path, linear: MethodRates) -> float:
    """Return the processor seconds for a byte between the disk and a merge, beyond the work of the merge itself."""
    recipe = make_recipe({"models": [str(folder / f"{name}.safetensors") for name in LARGE], "method": "linear"}, "it")
    plan = make_plan(recipe)
    began = time.process_time()
    merge_plan(plan, folder / "merged.safetensors", resume=False)
    seconds = time.process_time() - began
    work = count_work(plan)
    seconds -= linear.element * sum(each.elements for each in work)
    return max(0.0, seconds) / (plan.read_bytes + plan.out_bytes)


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
    compression_flops: float


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

    def compression(self, plain: MethodRates) -> float:
        """Return the processor seconds of an operation that turns a full change into factors."""
        found = self.measure(PLAIN, "square", kind="adapter", rank=16)
        return max(0.0, found.seconds - plain.element * found.elements) / found.compression_flops

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
        base = {"base": str(self.folder / f"{models}-base.safetensors")}
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
            compression_flops=sum(each.compression_flops for each in work),
        )
