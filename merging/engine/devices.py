"""The kinds of devices that merging computes on, and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from merging.maths.lazy_torch import torch

__all__ = ["KINDS", "Kind", "kind_of", "main_device"]


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

    def open_stream(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context in which the thread's work has a stream of its own."""
        return nullcontext()

    def synchronize(self, device: torch.device) -> None:
        """Return when the device has finished the thread's work."""

    def mark(self, device: torch.device) -> Any:
        """Return an event that the device reaches after the thread's work so far; None where nothing runs ahead."""


class StreamingKind(Kind):
    """GPUs with streams and pinned memory: ``cuda`` and ``xpu``."""

    pins = True

    def count(self) -> int:
        return int(self.module.device_count()) if self.module.is_available() else 0

    def open_stream(self, device: torch.device) -> AbstractContextManager[object]:
        stream: AbstractContextManager[object] = self.module.stream(self.module.Stream(device))
        return stream

    def synchronize(self, device: torch.device) -> None:
        self.module.current_stream(device).synchronize()

    def mark(self, device: torch.device) -> Any:
        return self.module.current_stream(device).record_event()


class MetalKind(Kind):
    """Apple's GPU, ``mps``: one, with one stream for all threads, in the host's memory."""

    def count(self) -> int:
        return int(torch.backends.mps.is_available())

    def synchronize(self, device: torch.device) -> None:
        torch.mps.synchronize()


KINDS: dict[str, Kind] = {
    each.name: each for each in (Kind("cpu"), StreamingKind("cuda"), StreamingKind("xpu"), MetalKind("mps"))
}
"""The kinds of devices by their names, in the order in which ``auto`` looks for them."""


def kind_of(device: torch.device) -> Kind:
    """Return the kind of a device."""
    return KINDS[device.type]


def main_device(devices: Sequence[torch.device]) -> torch.device:
    """Return the first device, whose kind all others are of; the CPU for none."""
    return devices[0] if devices else torch.device("cpu")
