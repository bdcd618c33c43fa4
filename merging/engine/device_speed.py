"""The choice between the GPUs and the CPU for ``--device auto``, by a measurement of a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merging.engine.devices import KINDS, computing_on, kind_of
from merging.maths.lazy_torch import torch

__all__ = ["DeviceChoice", "choose_devices", "describe_choice"]

_ELEMENTS = 1 << 22
"""Elements of a tensor that is copied and added: 16 MB of float32."""

_SIDE = 1024
"""Side of the matrices that are multiplied."""

_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """The devices that were chosen, and the reason."""

    devices: tuple[torch.device, ...]
    notice: str


_CHOICES: dict[bool, DeviceChoice] = {}
"""Choices of this process, without and with decompositions."""


def choose_devices(decomposes: bool) -> tuple[torch.device, ...]:
    """Return the GPUs where these are faster than the CPU; this is measured once in a process.

    Args:
        decomposes: whether the work is to decompose matrices. Products of matrices are measured then, and otherwise an
            addition with the copies to the device and back, which bound most merges.
    """
    kind = next((kind for name, kind in KINDS.items() if name != "cpu" and kind.count()), None)
    if kind is None:
        return (torch.device("cpu"),)
    if decomposes not in _CHOICES:
        devices = tuple(torch.device(kind.name, number) for number in range(kind.count()))
        here, there = _measure(torch.device("cpu"), decomposes), _measure(devices[0], decomposes)
        work = "a product of matrices" if decomposes else "an addition, with copies to the GPU and back,"
        times = f"{work} takes {1e3 * there:.1f} ms on {kind.name}, and {1e3 * here:.1f} ms on the CPU"
        chosen = devices if there < here else (torch.device("cpu"),)
        _CHOICES[decomposes] = DeviceChoice(chosen, f"device auto: computed on {chosen[0].type}: {times}")
    return _CHOICES[decomposes].devices


def describe_choice(devices: Sequence[torch.device]) -> list[str]:
    """Return the notice on devices, if ``auto`` chose them."""
    return [each.notice for each in _CHOICES.values() if each.devices is devices]


def _measure(device: torch.device, decomposes: bool) -> float:
    """Return the least seconds that the work takes on a device."""
    with torch.inference_mode(), computing_on(device):
        work = _product(device) if decomposes else _addition(device)
        work()  # starts the device, and takes the memory
        return min(_time(work, device) for _ in range(_ROUNDS))


def _time(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    kind_of(device).synchronize(device)
    return time.perf_counter() - began


def _addition(device: torch.device) -> Callable[[], object]:
    pins = kind_of(device).pins
    one, other, out = (torch.zeros(_ELEMENTS, pin_memory=pins) for _ in range(3))
    if device.type == "cpu":
        return lambda: torch.add(one, other, out=out)
    return lambda: out.copy_(one.to(device, non_blocking=pins) + other.to(device, non_blocking=pins), non_blocking=pins)


def _product(device: torch.device) -> Callable[[], object]:
    matrix = torch.ones(_SIDE, _SIDE).to(device)
    return lambda: matrix @ matrix
