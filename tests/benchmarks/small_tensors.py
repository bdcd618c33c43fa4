"""The time to plan and to run a merge of very many small tensors, and the memory of its plan, for each tensor.

python tests/benchmarks/small_tensors.py --tensors 1000 50000
"""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed import import_everything, mixture, options, table, write_models


def small_tensors(counts: list[int], repeats: int, work: Path) -> None:
    """Print the processor time to plan and to run a merge of two models of many small tensors, and a plan's memory."""
    merging = import_everything()

    def seconds_of(call: Callable[..., object], **settings: Any) -> float:
        """The median of some calls."""
        times = []
        for _ in range(repeats):
            start = time.process_time()
            call(**settings)
            times.append(time.process_time() - start)
        return statistics.median(times)

    rows = []
    for tensors in counts:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            write_models(Path(folder), *mixture(tensors), names=("a", "b"))
            settings = {"models": [Path(folder) / name for name in ("a", "b")], "method": "linear"}
            merging.preview(**settings)  # imports, and the page cache
            planned = seconds_of(merging.preview, **settings)
            output = {"output": Path(folder) / "merged", "overwrite": True, "threads": 1}
            both = seconds_of(merging.merge, **settings, **output)
            tracemalloc.start()
            plan = merging.preview(**settings)
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            del plan
            each = [f"{1e6 * seconds / tensors:.0f}" for seconds in (planned, both - planned)]
            rows.append([f"{tensors:,}", *each, f"{held / tensors:,.0f}"])
    print(table(["tensors", "microseconds a tensor to plan", "to run", "bytes a tensor of a plan"], rows))


def main() -> None:
    """Parse the command line and print the table."""
    parser = options(__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=[1000, 50_000], help="tensors of each model")
    chosen = parser.parse_args()
    small_tensors(chosen.tensors, chosen.repeats, chosen.work)


if __name__ == "__main__":
    main()
