"""The kinds of devices that merging computes on, and their differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from merging.maths.lazy_torch import torch

__all__ = ["KINDS", "Kind", "computing_on", "kind_of", "main_device", "supply_operations"]


class Kind:
    """A kind of device that torch computes on, by the name that torch gives it."""

    pins = False
    """Whether copies from and to pinned memory of the host go on while the host does something else."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def module(self) -> Any:
        """The module of torch for this kind."""
        return getattr(torch, self.name)

    def count(self) -> int:
        """Return the number of these devices that the process may use."""
        return 1

    def has_float64(self, device: torch.device) -> bool:
        """Return whether the device computes in float64."""
        return True

    def open_stream(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context in which the thread's work has a stream of its own."""
        return nullcontext()

    def synchronize(self, device: torch.device) -> None:
        """Return when the device has finished the thread's work."""

    def mark(self, device: torch.device) -> Any:
        """Return an event that the device reaches after the thread's work so far; None where nothing runs ahead."""

    def free_memory(self, device: torch.device) -> int | None:
        """Return the bytes of the device's own memory that are free; None if it has none of its own."""
        return None


class StreamingKind(Kind):
    """GPUs with streams and pinned memory: ``cuda``, and ``xpu`` of Intel, which partly lack float64."""

    pins = True

    def count(self) -> int:
        return int(self.module.device_count()) if self.module.is_available() else 0

    def has_float64(self, device: torch.device) -> bool:
        return bool(getattr(self.module.get_device_properties(device), "has_fp64", True))

    def open_stream(self, device: torch.device) -> AbstractContextManager[object]:
        stream: AbstractContextManager[object] = self.module.stream(self.module.Stream(device))
        return stream

    def synchronize(self, device: torch.device) -> None:
        self.module.current_stream(device).synchronize()

    def mark(self, device: torch.device) -> Any:
        return self.module.current_stream(device).record_event()

    def free_memory(self, device: torch.device) -> int | None:
        return int(self.module.mem_get_info(device)[0])


class MetalKind(Kind):
    """Apple's GPU, ``mps``: one, without float64, with one stream for all threads."""

    def count(self) -> int:
        return int(torch.backends.mps.is_available())

    def has_float64(self, device: torch.device) -> bool:
        return False

    def synchronize(self, device: torch.device) -> None:
        torch.mps.synchronize()


KINDS: dict[str, Kind] = {
    each.name: each for each in (Kind("cpu"), StreamingKind("cuda"), StreamingKind("xpu"), MetalKind("mps"))
}
"""The kinds of devices by their names, in the order in which ``auto`` looks for them."""


def kind_of(device: torch.device) -> Kind:
    """Return the kind of a device."""
    return KINDS[device.type]


def supply_operations(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the CPU does the operations that a device without float64 lacks."""
    if device.type not in KINDS or kind_of(device).has_float64(device):
        return nullcontext()
    from merging.engine.missing_operations import MissingOperations

    return MissingOperations(device).supply()


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Let the thread compute on a device: on a stream of its own, whose work is done when the body ends."""
    kind = kind_of(device)
    with kind.open_stream(device), supply_operations(device):
        yield
        kind.synchronize(device)  # another thread uses the results, on another stream


def main_device(devices: Sequence[torch.device]) -> torch.device:
    """Return the first device, whose kind all others are of; the CPU for none."""
    return devices[0] if devices else torch.device("cpu")
