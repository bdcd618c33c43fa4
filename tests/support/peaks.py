"""The memory that a merge takes, in a process of its own, and that its plan promises: both above its imports.

The system can hold the process to a limit: a request of memory beyond it fails (``hard``), or its control group kills
it (``prefix``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Peak", "peak_of"]


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes above the imports, promised and at most taken; workers and seconds of the merge; bytes of the imports."""

    promised: int
    taken: int
    workers: int
    seconds: float
    imports: int


_SCRIPT = """
import json, resource, sys, threading
from contextlib import suppress
from pathlib import Path
import torch  # which plans do without
with suppress(ImportError):
    import llvmlite.binding  # for compiled kernels, where any are kept
from merging import preview
from merging.api.merge_files import merge_plan, workers_within

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

options, threads, most, hard = map(json.loads, sys.argv[1:])
plan = preview(**options)
workers = workers_within(plan, threads, most)
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the highest level so far is that of now
if hard is not None:
    threading.stack_size(1 << 20)  # a thread's stack counts in full
    allowed = status("VmData:") + hard + (threads + 1 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
done = merge_plan(plan, Path(options["output"]), threads=threads, max_memory=most, overwrite=True)
print(json.dumps([plan.memory(workers), status("VmHWM:") - before, workers, done.seconds, before]))
"""


def peak_of(
    options: dict[str, Any],
    threads: int,
    max_memory: int | None = None,
    hard: int | None = None,
    prefix: Sequence[str] = (),
) -> Peak:
    """Carry a merge out, whose ``options`` are those of :func:`merging.preview` in plain values.

    ``hard`` are the bytes above the imports that the system gives it, ``prefix`` the words of a command that runs it.
    """
    words = [*prefix, sys.executable, "-c", _SCRIPT, *map(json.dumps, (options, threads, max_memory, hard))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Peak(*json.loads(done.stdout.splitlines()[-1]))
