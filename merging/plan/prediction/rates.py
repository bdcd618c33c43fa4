"""Rates of a machine: the time that it takes for bytes, elements and floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merging.plan.prediction.default_rates import METHODS
from merging.plan.prediction.work import ItemWork

__all__ = ["DEFAULT", "GPU_RATES", "GpuRates", "MethodRates", "Rates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRates:
    """Processor seconds of a method; of a wrapper, the seconds that it adds to the method inside.

    Attributes:
        item: for a sweep over a tensor, however small.
        element: for an element of an input in a sweep.
        flop: for an operation of a decomposition of a full matrix; 0 for methods without any.
        core: for an operation of a decomposition of factors; 0 for methods without any.
    """

    item: float
    element: float
    flop: float = 0.0
    core: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates of a machine.

    Attributes:
        machine: its name, or empty for the defaults.
        measured: the day on which they were measured, or empty.
        folder: the folder on whose disk they were measured, or empty.
        cores: the number of its processor cores.
        read: the bytes a second that are read from its disk.
        write: the bytes a second that are written to its disk, until they are durable.
        transfer: processor seconds for a byte that comes from the disk, or goes to it.
        product: processor seconds for an operation of a product of factors.
        compression: processor seconds for an operation that turns a full change into factors.
        methods: rates of methods, by name.
    """

    machine: str = ""
    measured: str = ""
    folder: str = ""
    cores: int = 2
    read: float = 1.0e9
    write: float = 0.5e9
    transfer: float = 3.3e-10
    product: float = 1.2e-11
    compression: float = 2.7e-11
    methods: Mapping[str, MethodRates] = field(default_factory=dict)

    def of(self, name: str) -> MethodRates:
        """Return the rates of a method; a method from elsewhere has the rates of ``ties``."""
        return self.methods.get(name) or DEFAULT.methods.get(name) or DEFAULT.methods["ties"]

    def seconds(self, work: ItemWork) -> float:
        """Return the processor seconds of an item, without the transfer of its bytes."""
        links = [self.of(name) for name in work.method]
        return (
            work.product_flops * self.product
            + work.compression_flops * self.compression
            + work.sweeps * sum(link.item for link in links)
            + work.elements * sum(link.element for link in links)
            + work.decomposition_flops * max((link.flop for link in links), default=0.0)
            + work.core_flops * max((link.core for link in links), default=0.0)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """Assumed rates of a GPU of a data centre: no GPU was measured.

    Attributes:
        link: the bytes a second between the GPU and the host.
        flop: seconds for an operation of a decomposition in float64.
        product: seconds for an operation of a product in float32.
    """

    link: float = 20e9
    flop: float = 2e-12
    product: float = 1e-13

    def seconds(self, work: ItemWork) -> float:
        """Return the seconds of an item on one GPU, which is bounded by the bytes that it moves or by operations."""
        flops = work.decomposition_flops + work.core_flops
        products = work.product_flops + work.compression_flops
        moved = work.read_bytes * work.sweeps + work.written_bytes
        return max(moved / self.link, flops * self.flop + products * self.product)


def _method_rates(item: float, element: float, flop: float = 0.0, core: float = 0.0) -> MethodRates:
    return MethodRates(item=item, element=element, flop=flop, core=core)


DEFAULT = Rates(methods={name: _method_rates(*values) for name, values in METHODS.items()})
"""Rates of the machine on which the project was measured."""

GPU_RATES = GpuRates()
