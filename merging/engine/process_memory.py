"""Memory of this process and of the machine, as the operating system and the C library see it."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["available_memory", "keep_freed_memory", "memory_limits", "private_memory", "release_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks of a few megabytes, since the next tile needs them again.

    By default glibc returns them to the system, which zeroes them each time. This would cost a quarter of a merge.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        mallopt(_M_TRIM_THRESHOLD, 1 << 28)


def release_freed_memory() -> None:
    """Have the C library return the freed blocks that it keeps, which are scattered after a while."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def private_memory() -> int:
    """Return the bytes of memory that this process shares with no file; 0 where the system does not say."""
    try:
        with Path("/proc/self/statm").open("rb") as file:
            _, resident, shared = map(int, file.read().split()[:3])
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int | None:
    """Return the bytes of memory that are available now, or to this container; None where no system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    return min([available, *memory_limits()])


def memory_limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the limits of memory of this process's control groups, in bytes: its own and those around it."""
    limits = []
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = top / path.lstrip("/")
        for each in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # no limit is "max", and a container does not see the groups around it
                limits.append(int((each / name).read_text(encoding="ascii")))
            if each == top:
                break
    return limits
