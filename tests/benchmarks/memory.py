"""The memory that merges of whole models take above their imports, beside the plan's promise.

    python tests/benchmarks/memory.py --size 0.5

The exit code is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speed import llama, table, write_models

from support.peaks import peak_of

CASES: tuple[tuple[str, int, tuple[int, ...]], ...] = (("linear", 2, (1, 2, 64)), ("ties", 3, (1, 2)))
"""Methods, how many models each merges, and the numbers of threads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=float, default=0.5, help="gigabytes of each checkpoint")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: the temporary one)")
    args = parser.parse_args()
    rows, kept = [], True
    with tempfile.TemporaryDirectory(dir=args.work) as root:
        folder = Path(root)
        write_models(folder, *llama(args.size), ("base", "a", "b", "c"))
        for method, count, threads in CASES:
            base: dict[str, Any] = {} if method == "linear" else {"base": str(folder / "base")}
            models = [str(folder / name) for name in ("a", "b", "c")[:count]]
            options = {"models": models, "method": method, "output": str(folder / "out.safetensors"), **base}
            for number in threads:
                peak = peak_of(options, number)
                kept = kept and peak.taken <= peak.promised
                taken = [f"{peak.promised / 1e6:.0f} MB", f"{peak.taken / 1e6:.0f} MB"]
                rows.append([f"{method}, {count} models", str(peak.workers), *taken])
    print(table(["merge", "threads", "promised", "taken"], rows))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
