"""How often `merge suggest` is within a point of the best of ten methods, on twelve sets of models.

    python tests/benchmarks/suggest.py --json suggest.json

Sets are fine-tunes and LoRAs of quality.py's encoder: of different tasks, of related ones, of one task from several
seeds, of unequal sizes, and the shipped adapters. Each of TEN runs at one scale, chosen before any figure was seen. The
accuracy is the mean over the set's tasks. Models are trained where they are not there yet (see --work).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality_entries import Entry
from quality_models import Judge, Models
from safetensors.torch import load_file, save_file
from speed import table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from encoder import ADAPTERS
from tasks import DATA

import merging

TEN = (
    Entry("linear", "linear", {}),
    Entry("task arithmetic 0.3", "task_arithmetic", {"scale": 0.3}),
    Entry("task arithmetic 0.5", "task_arithmetic", {"scale": 0.5}),
    Entry("ties", "ties", {}),
    Entry("pcb", "pcb", {}),
    Entry("magmax", "magmax", {}),
    Entry("karcher", "karcher", {"space": "changes"}),
    Entry("opcm", "opcm", {}),
    Entry("tsv", "tsv", {}),
    Entry("iso_c", "iso_c", {}),
)
POINT = 1.0  # per cent
SHIPPED = "shipped"


@dataclass(frozen=True)
class ModelSet:
    """Models that somebody may want to merge, of the kind full, lora or shipped."""

    title: str
    kind: str
    tasks: tuple[str, ...]
    seeds: int = 1
    unequal: str = ""

    def load(self, judge: Judge, steps: int) -> Models:
        """The models, trained if they are not there."""
        if self.kind == SHIPPED:
            return Shipped(judge)
        return Models(self.kind, judge, steps, seeds=self.seeds, unequal=self.unequal)


FIVE = ("spam", "wordnet", "speech", "era", "tweets")
SETS = (
    ModelSet("full: two tasks", "full", FIVE[:2]),
    ModelSet("full: three tasks", "full", FIVE[2:]),
    ModelSet("full: five tasks", "full", FIVE),
    ModelSet("full: two tasks on one dictionary", "full", ("wordnet", "speech")),
    ModelSet("full: one task, three seeds", "full", ("names",), seeds=3),
    ModelSet("LoRA: two tasks", "lora", FIVE[:2]),
    ModelSet("LoRA: three tasks", "lora", FIVE[2:]),
    ModelSet("LoRA: five tasks", "lora", FIVE),
    ModelSet("LoRA: one task, three seeds", "lora", ("names",), seeds=3),
    ModelSet("LoRA: three tasks, one trained longer", "lora", ("spam", "tweets", "names"), unequal="names"),
    ModelSet("shipped adapters: two tasks", SHIPPED, ("bbc", "movie")),
    ModelSet("shipped adapters: four tasks", SHIPPED, ("bbc", "movie", "spam", "wordnet")),
)


class Shipped(Models):
    """The adapters of examples/."""

    def __init__(self, judge: Judge) -> None:
        folders = [ADAPTERS / name for name in judge.tasks]
        states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        self._take("lora", judge, states, json.loads((folders[0] / "adapter_config.json").read_text()))


def write(models: Models, judge: Judge, folder: Path) -> tuple[list[Path], Path | None]:
    """Write models as a user has them; return their places, and the base's for full fine-tunes."""
    places = [folder / str(number) for number in range(len(models.states))]
    for place, state in zip(places, models.states, strict=True):
        place.mkdir()
        if models.config:
            save_file(state, place / "adapter_model.safetensors")
            (place / "adapter_config.json").write_text(json.dumps(models.config))
        else:
            save_file(judge.base | state, place / "model.safetensors")
    if models.config:
        return places, None
    save_file(judge.base, folder / "base.safetensors")
    return places, folder / "base.safetensors"


def accuracy(models: Models, judge: Judge, entry: Entry) -> float:
    """The mean over the tasks in per cent."""
    (merged,) = models.merges(entry, None, [])
    return 100 * statistics.fmean(each.mean().item() for each in judge.right(merged, "test").values())


def rows(sets: Sequence[ModelSet], judge: Judge, steps: int) -> Iterator[dict[str, Any]]:
    """For each set: the suggestion, and the accuracies of it and of the ten."""
    for each in sets:
        narrow = judge.narrow(each.tasks)
        models = each.load(narrow, steps)
        with tempfile.TemporaryDirectory() as folder:
            places, base = write(models, narrow, Path(folder))
            said = merging.suggest(places, base=base)
        cheaper = Entry("cheaper", said.cheaper[0], said.cheaper[1])
        entries = {"suggested": Entry("suggested", said.chain, said.parameters), "cheaper": cheaper}
        entries |= {entry.title: entry for entry in TEN}
        found = {title: accuracy(models, narrow, entry) for title, entry in entries.items()}
        chain = " ".join([said.chain, *(f"{name} {value}" for name, value in said.parameters.items())])
        yield {"set": each.title, "chain": chain, "changes": said.changes, "sizes": said.sizes, "accuracy": found}
        print(f"{each.title}: {found}", file=sys.stderr, flush=True)


def show(found: Sequence[dict[str, Any]]) -> None:
    """Print the sets, and how often each fixed choice is within a point of the best of ten."""
    cells, close = [], dict.fromkeys(found[0]["accuracy"], 0)
    for row in found:
        reached = row["accuracy"]
        best = max((entry.title for entry in TEN), key=lambda title: reached[title])
        for title in close:
            close[title] += reached[title] >= reached[best] - POINT
        shown = [reached["suggested"], reached["cheaper"], reached[best]]
        cells.append([row["set"], row["chain"], *(f"{each:.1f}" for each in shown), best])
    titles = ["set", "suggested", "its accuracy", "the cheaper sum's", "the best of ten", "which is"]
    print("\n" + table(titles, cells), end="\n\n")
    print(table(["choice", f"within a point, of {len(found)} sets"], [[title, str(n)] for title, n in close.items()]))


def main() -> None:
    """Parse the command line, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=[each.title for each in SETS], help="only these")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 16 texts")
    parser.add_argument("--texts", type=int, default=200, help="test texts a task")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "merging-quality", help="what is kept")
    parser.add_argument("--json", type=Path, help="write everything there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sets = [each for each in SETS if not chosen.sets or each.title in chosen.sets]
    names = dict.fromkeys(name for each in sets for name in each.tasks)
    found = list(rows(sets, Judge(list(names), chosen.work, DATA, 1, chosen.texts), chosen.steps))
    show(found)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
