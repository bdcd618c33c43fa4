"""The devices and the number of workers of a merge, as the machine and the memory allow."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merging.engine.device_speed import choose_devices, describe_choice
from merging.engine.devices import KINDS, kind_of
from merging.engine.process_memory import available_memory
from merging.engine.tiles import GPU_TILE
from merging.errors import OptionError
from merging.maths.lazy_torch import torch
from merging.plan import estimates
from merging.plan.merge_plan import Plan
from merging.plan.sizes import parse_size

__all__ = ["describe_choice", "pick_device", "pick_devices", "workers_within"]

_NUMBERS = re.compile("[a-z]+(:[0-9]{1,4}(,[0-9]{1,4})*)?")
"""A kind of device, and the numbers of some."""


def workers_within(
    plan: Plan,
    threads: int,
    max_memory: int | str | None,
    more: int = 0,
    *,
    devices: Sequence[torch.device] = (),
) -> int:
    """Return the number of workers that fit into ``max_memory`` bytes above the imports, at most ``threads``.

    ``more`` is the memory that each worker takes in addition to the plan's own. Without a limit they take at most half
    of the memory that is available. One worker always fits. On GPUs it is also the number of workers whose tiles fit
    into the GPUs' free memory, at least one on each.

    Raises:
        OptionError: with the number of bytes needed, if not even one worker fits.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise OptionError(f"threads = {threads!r}: at least one is needed")
    threads = _fitting_devices(plan, threads, devices)
    if max_memory is None:
        available = available_memory()
        return threads if available is None else max(1, _fitting(plan, threads, available // 2, more))
    max_memory = parse_size(max_memory, "max_memory")
    needed = plan.memory(1) + more
    if needed > max_memory:
        raise OptionError(
            f"max_memory = {max_memory / 1e6:.0f} MB is too little: this merge needs {needed / 1e6:.0f} MB"
        )
    return _fitting(plan, threads, max_memory, more)


def _fitting_devices(plan: Plan, threads: int, devices: Sequence[torch.device]) -> int:
    free = [kind_of(device).free_memory(device) for device in devices]
    least = min((each for each in free if each is not None), default=None)
    if least is None:
        return threads
    each = estimates.worker_bytes(plan.items, plan.recipe.method, plan.recipe.rank, GPU_TILE)
    return min(threads, len(devices) * max(1, least // max(1, each)))


def _fitting(plan: Plan, threads: int, memory: int, more: int) -> int:
    return min(threads, (memory - plan.memory(0)) // max(1, plan.worker_bytes + more))


def pick_devices(name: str | torch.device, plan: Plan | None = None) -> tuple[torch.device, ...]:
    """Return the devices of a name: ``cpu``, ``cuda`` for all such GPUs, ``cuda:0,1`` for some, ``mps``, ``xpu``.

    ``auto`` means all GPUs where these are faster than the CPU at the work of ``plan``; without a plan, at adding.

    Raises :class:`~merging.errors.OptionError` for devices that this machine does not have.
    """
    name = str(name)
    if name == "auto":
        links = plan.recipe.method.links() if plan is not None else ()
        return choose_devices(decomposes=any(link.decomposed_side for link in links))
    kind, _, listed = name.partition(":")
    if kind not in KINDS:
        raise OptionError(f"device = {name!r}: use cpu, cuda, cuda:N, cuda:N,M, mps, xpu or auto")
    if not _NUMBERS.fullmatch(name):
        raise OptionError(f"device = {name!r}: name GPUs by their numbers, as in {kind}:0,1")
    there = KINDS[kind].count()
    if not there:
        raise OptionError(
            f"device = {name!r}: this machine has no such GPU, or this torch does not support it: use cpu or auto"
        )
    numbers = [int(each) for each in listed.split(",")] if listed else list(range(there))
    if len(set(numbers)) < len(numbers):
        raise OptionError(f"device = {name!r}: a GPU is named twice: name each once")
    if not set(numbers) <= set(range(there)):
        found = f"only {kind}:0" if there == 1 else f"{kind}:0 to {kind}:{there - 1}"
        raise OptionError(f"device = {name!r}: this machine has {found}: use these, cpu or auto")
    return (torch.device("cpu"),) if kind == "cpu" else tuple(torch.device(kind, number) for number in numbers)


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device of a name, for work that one device does: the first GPU where the name means all.

    Raises :class:`~merging.errors.OptionError` for a device that this machine does not have, and for several.
    """
    devices = pick_devices(name)
    if "," in str(name):
        raise OptionError(f"device = {str(name)!r}: this work is done by one device: name one GPU")
    return devices[0]
