"""The device and the number of workers of a merge, as the machine and the memory allow."""

from __future__ import annotations

from merging.engine.process_memory import available_memory
from merging.errors import OptionError
from merging.maths.lazy_torch import torch
from merging.plan.merge_plan import Plan
from merging.plan.sizes import parse_size

__all__ = ["pick_device", "workers_within"]


def workers_within(plan: Plan, threads: int, max_memory: int | str | None) -> int:
    """Return the number of workers that fit into ``max_memory`` bytes above the imports, at most ``threads``.

    Without a limit they take at most half of the memory that is available. One worker always fits.

    Raises:
        OptionError: with the number of bytes needed, if not even one worker fits.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise OptionError(f"threads = {threads!r}: at least one is needed")
    if max_memory is None:
        available = available_memory()
        return threads if available is None else max(1, _fitting(plan, threads, available // 2))
    max_memory = parse_size(max_memory, "max_memory")
    needed = plan.memory(1)
    if needed > max_memory:
        raise OptionError(
            f"max_memory = {max_memory / 1e6:.0f} MB is too little: this merge needs {needed / 1e6:.0f} MB"
        )
    return _fitting(plan, threads, max_memory)


def _fitting(plan: Plan, threads: int, memory: int) -> int:
    return min(threads, (memory - plan.memory(0)) // max(1, plan.worker_bytes))


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device of a name: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a GPU if there is one.

    Raises :class:`~merging.errors.OptionError` for a device that this machine does not have.
    """
    name = str(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"device = {name!r}: use cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device = {name!r}: merging runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise OptionError(
            f"device = {name!r}: this machine has {found or 'no'} such GPU{'s' if found > 1 else ''}: use cpu or auto"
        )
    return device
