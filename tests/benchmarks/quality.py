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
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from quality_entries import CHAINS, KINDS, METHODS, REFERENCE, Entry
from quality_models import LONGER, RAISED, RANK, Judge, Models, Right
from quality_trials import Trial, normalised, paired
from speed import table
from tasks import DATA, MORE, TASKS

import merging


def edged(row: Mapping[str, Any]) -> str:
    """The value that was chosen; a star marks one that is still at the edge of its grid."""
    value, points = row.get("value"), row.get("validation")
    return "-" if value is None else f"{value:g}" + ("*" if points and value in (min(points), max(points)) else "")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as it is printed."""
    shown = [row["method"], edged(row), f"{row['score']:.1f}" if "score" in row else "-"]
    shown += [f"{row['accuracy']:.1f}", f"{row['normalised']:.1f}", f"{row['difference']:+.1f} ± {row['error']:.1f}"]
    return [*shown, f"{row['seconds']:.2f}" if "seconds" in row else "-"]


def compare(models: Models, entries: Sequence[Entry], judge: Judge) -> dict[str, Any]:
    """What every method reached in per cent, after the base and each task's own model; the scores of the chains on the
    validation texts; and what was chosen there, with what it reached on the test texts."""
    kind = models.kind
    each = list(zip(judge.tasks, models.each, strict=True))
    own = {s: {name: judge.right(weights, s, [name])[name] for name, weights in each} for s in judge.asked}
    rights: dict[str, Right] = {"base": judge.right({}, "test"), "individual": own["test"]}
    trials: list[Trial] = []
    for entry in entries:
        start = time.perf_counter()
        try:
            trials.append(Trial(entry, models, judge, own["valid"]))
            if entry in METHODS:
                rights[entry.title] = trials[-1].right(trials[-1].value, "test")
        except merging.MergingError as refusal:
            print(f"{kind} {entry.title}: refused: {refusal}", flush=True)
        print(f"{kind} {entry.title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    winner = max(trials, key=lambda trial: trial.score)
    published = max((trial for trial in trials if trial.entry in METHODS), key=lambda trial: trial.score)
    told = {trial.entry.title: trial.told() for trial in trials}

    def row(title: str, right: Right) -> dict[str, Any]:
        tasks = {name: 100 * each.mean().item() for name, each in right.items()}
        mean, share = statistics.fmean(tasks.values()), normalised(right, own["test"])
        difference, error = paired(right, rights[REFERENCE])
        reached = {"accuracy": mean, "normalised": share, "difference": difference, "error": error}
        return {"method": title, "tasks": tasks, **reached, **told.get(title, {})}

    title = winner.entry.title
    right = rights[title] if title in rights else winner.right(winner.value, "test")
    difference, error = paired(right, rights[published.entry.title])
    against = {"published": published.entry.title, "against published": difference, "error": error}
    return {
        "norms": models.norms(),
        "rows": [row(title, right) for title, right in rights.items()],
        "chains": [{"method": each.entry.title, **each.told()} for each in trials if each.entry in CHAINS],
        "chosen on validation": {"row": row(title, right), **against, "of": len(trials)},
    }


def verdict(chosen: Mapping[str, Any]) -> str:
    """What was chosen on validation and what the test texts say, in one line."""
    row = chosen["row"]
    shown = f"{row['method']} ({edged(row)}), the best of {chosen['of']} there with {row['score']:.1f}"
    told = f"chosen on validation: {shown}: on the test texts {row['accuracy']:.1f}"
    if row["method"] == chosen["published"]:
        return f"{told}; it is a published method itself"
    gap = f"{chosen['against published']:+.1f} ± {chosen['error']:.1f}"
    return f"{told}, against the best published method there, {chosen['published']}, {gap}"


def main() -> None:
    """Parse the command line, train what is missing, and print one pair of tables a kind."""
    titles = [entry.title for entry in (*METHODS, *CHAINS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS | MORE), help="comma-separated, all by default: %(default)s")
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS), help="what is merged")
    parser.add_argument("--methods", nargs="+", choices=titles, default=titles, help=f"only these, and {REFERENCE}")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 16 texts")
    parser.add_argument("--rank", type=int, default=RANK, help="rank of the LoRAs (%(default)s)")
    larger = f"train this task's model {LONGER} times as many steps at {RAISED} times the rate"
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
        found[kind] = compare(models, entries, judge)
        rows, chains, norms = found[kind]["rows"], found[kind]["chains"], found[kind]["norms"]
        alone = [
            [name, *(f"{row['tasks'][name]:.1f}" for row in rows[:2]), f"{norms[name]:.2f}"] for name in judge.tasks
        ]
        print("\n" + table(["task", "base", f"its own {kind}", "norm of the change"], alone), end="\n\n")
        heads = ["chosen", "on validation", "accuracy", "normalised", f"against {REFERENCE}", "seconds a merge"]
        print(table([f"{kind} method", *heads], [cells(row) for row in rows]), end="\n\n")
        if chains:
            shown = [[row["method"], edged(row), f"{row['score']:.1f}", f"{row['seconds']:.2f}"] for row in chains]
            print(table([f"{kind} chain", *heads[:2], heads[-1]], shown), end="\n\n")
        print(verdict(found[kind]["chosen on validation"]), flush=True)
    if chosen.json:
        told = {part: {kind: each[part] for kind, each in found.items()} for part in next(iter(found.values()))}
        chosen.json.write_text(json.dumps({"settings": vars(chosen), **told}, indent=1, default=str))


if __name__ == "__main__":
    main()
