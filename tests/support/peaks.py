"""The memory that a merge takes, in a process of its own, and that its plan promises: both above its imports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["Peak", "peak_of"]


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes above the imports: as promised, and at most taken; and the workers and seconds of the merge."""

    promised: int
    taken: int
    workers: int
    seconds: float


_SCRIPT = """
import json, sys
from pathlib import Path
from merging import preview
from merging.api.merge_files import merge_plan, workers_within

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

options, threads, most = json.loads(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
plan = preview(**options)
workers = workers_within(plan, threads, most)
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the highest level so far is that of now
done = merge_plan(plan, Path(options["output"]), threads=threads, max_memory=most, overwrite=True)
print(json.dumps([plan.memory(workers), status("VmHWM:") - before, workers, done.seconds]))
"""


def peak_of(options: dict[str, Any], threads: int, max_memory: int | None = None) -> Peak:
    """Carry a merge out, whose ``options`` are those of :func:`merging.preview` in plain values."""
    words = [sys.executable, "-c", _SCRIPT, json.dumps(options), str(threads), json.dumps(max_memory)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Peak(*json.loads(done.stdout.splitlines()[-1]))
