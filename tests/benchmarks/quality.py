"""What merging methods keep of real tasks: one encoder, a fine-tune and a LoRA a task, frozen heads.

    python tests/benchmarks/quality.py --kind lora --methods ties do --json lora.json

Trains what is not there yet (see --work), merges everything by each method of METHODS, searches one parameter a method
on the validation texts, and prints accuracy on the test texts. Tasks, texts and encoder are those of examples/. A
second run trains nothing, and never asks the same weights twice. A regression benchmark on one small encoder, and no
evidence about methods: learning rates were chosen so that merging costs something.

CHAINS are further compositions and variants. They are searched on the validation texts alone; which of all entries does
best there is "chosen on validation", and only that one is asked the test texts, beside the best of METHODS.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from quality_entries import CHAINS, KINDS, METHODS, REFERENCE
from quality_models import LONGER, RANK, Judge, Models
from quality_trials import compare, show
from speed import table
from tasks import DATA, MORE, TASKS


def main() -> None:
    """Parse the command line, train what is missing, and print one pair of tables a kind."""
    titles = [entry.title for entry in (*METHODS, *CHAINS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS | MORE), help="comma-separated, all by default: %(default)s")
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS), help="what is merged")
    parser.add_argument("--methods", nargs="+", choices=titles, default=titles, help=f"only these, and {REFERENCE}")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 16 texts")
    parser.add_argument("--rank", type=int, default=RANK, help="rank of the LoRAs (%(default)s)")
    larger = f"train this task's model {LONGER} times as many steps"
    parser.add_argument("--unequal", metavar="TASK", help=larger)
    parser.add_argument("--texts", type=int, default=500, help="test texts a task")
    parser.add_argument("--valid", type=int, default=200, help="validation texts a task")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "merging-quality", help="what is kept")
    parser.add_argument("--json", type=Path, help="write everything there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # the sums of one thread come out the same on every run
    wanted = [entry for entry in (*METHODS, *CHAINS) if entry.title in (REFERENCE, *chosen.methods)]
    judge = Judge(chosen.tasks.split(","), chosen.work, DATA, chosen.valid, chosen.texts)
    found = {}
    for kind in chosen.kind:
        models = Models(kind, judge, chosen.steps, rank=chosen.rank, unequal=chosen.unequal or "")
        entries = [entry for entry in wanted if kind in entry.kinds]
        norms = models.norms()
        found[kind] = {"norms": norms, **compare(models, entries, judge)}
        rows = found[kind]["rows"]
        alone = [
            [name, *(f"{row['tasks'][name]:.1f}" for row in rows[:2]), f"{norms[name]:.2f}"] for name in judge.tasks
        ]
        print("\n" + table(["task", "base", f"its own {kind}", "norm of the change"], alone), end="\n\n")
        show(kind, found[kind])
    if chosen.json:
        told = {part: {kind: each[part] for kind, each in found.items()} for part in next(iter(found.values()))}
        chosen.json.write_text(json.dumps({"settings": vars(chosen), **told}, indent=1, default=str))


if __name__ == "__main__":
    main()
