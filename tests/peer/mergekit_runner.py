"""Run mergekit merges in one process: started by the peer's own Python, since mergekit is never installed beside us.

    python mergekit_runner.py CONFIG.yaml OUT [CONFIG.yaml OUT ...]

Prints one JSON list with an entry per merge: ``output``, ``seconds`` of run_merge alone, ``peak_private_bytes`` (the
highest anonymous memory while it ran, above the level just after the imports) and ``error`` (null if it succeeded).

Only ``main`` imports mergekit: the speed comparison measures our own merges with ``measure`` as well.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

__all__ = ["Measured", "measure", "private_bytes"]

INTERVAL = 0.01  # seconds between two looks at the memory


class Measured(TypedDict):
    """What one piece of work took."""

    output: str
    seconds: float
    processor: float
    peak_private_bytes: int
    error: str | None


def private_bytes() -> int:
    """Anonymous memory in use now; pages of mapped input files are not counted, the system can drop those."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak(threading.Thread):
    """Watches the private memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = private_bytes()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(INTERVAL):
            self.highest = max(self.highest, private_bytes())

    def stop(self) -> int:
        """The highest level seen."""
        self.done.set()
        self.join()
        return max(self.highest, private_bytes())


def measure(work: Callable[[], object], output: str, floor: int) -> Measured:
    """Time and watch a piece of work; an exception becomes a line of text, so that other merges still run."""
    error = None
    peak = Peak()
    peak.start()
    start, processor = time.perf_counter(), time.process_time()
    try:
        work()
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    taken = peak.stop() - floor
    return {"output": output, "seconds": seconds, "processor": processor, "peak_private_bytes": taken, "error": error}


def main(arguments: list[str]) -> None:
    """Merge every pair of arguments and print what was measured."""
    if not arguments or len(arguments) % 2:
        raise SystemExit(__doc__)

    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # Our checkpoints have no tokenizer: asked to copy one, mergekit would only spend time on finding that out.
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)

    def merge(config: str, output: str) -> Measured:
        text = Path(config).read_text(encoding="utf-8")
        parsed = MergeConfiguration.model_validate(yaml.safe_load(text))
        return measure(lambda: run_merge(parsed, output, options, config_source=text), output, floor)

    floor = private_bytes()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON alone
        results = [merge(*pair) for pair in zip(arguments[::2], arguments[1::2], strict=True)]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
