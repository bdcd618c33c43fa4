"""What merging keeps: accuracy of the base, of each task's own adapter, and of merges of all the adapters.

    python examples/evaluate_merge.py                 # merges the shipped adapters in several ways itself
    python examples/evaluate_merge.py merged/ other/  # measures adapter folders that were merged before

Every column but "own adapter" is one model for all tasks. Takes two to three minutes on one core. LiNeS leaves the
early layers almost untouched; on an encoder of only six layers it can be worse than plain task arithmetic, which is no
sign of a fault: its gains were reported on deep networks and many tasks. Scales are fixed here, not searched; to search
them use `--split valid`, so that the test texts choose nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from encoder import ADAPTERS, accuracy, load_encoder, zero_shot_head
from peft import PeftModel
from tasks import DATA, load_task

MERGES: dict[str, tuple[str, dict[str, float]]] = {
    "linear": ("linear", {}),  # the plain average
    "task arithmetic 0.4": ("task_arithmetic", {"scale": 0.4}),
    "lines": ("lines", {}),
}


def merge_all(adapters: Iterable[Path], output: Path) -> dict[str, Path]:
    """Merge the adapters in every way of MERGES, each into a folder that PEFT loads."""
    import merging

    merged = {}
    for title, (method, parameters) in MERGES.items():
        merged[title] = output / method
        merging.merge([str(adapter) for adapter in adapters], method=method, output=str(merged[title]), **parameters)
    return merged


def measure(names: list[str], columns: dict[str, Path], data: Path, split: str, texts: int) -> list[list[float]]:
    """Accuracy of each task (row): of the base, of its own adapter, and of each merged adapter."""
    base, tokenizer = load_encoder()
    rows = []
    for name in names:
        task = load_task(name, data)
        head = zero_shot_head(base, tokenizer, task)
        examples = (task.valid if split == "valid" else task.test)[:texts]
        row = [accuracy(base, tokenizer, head, examples)]
        for folder in (ADAPTERS / name, *columns.values()):
            adapted = PeftModel.from_pretrained(load_encoder()[0], folder)
            row.append(accuracy(adapted, tokenizer, head, examples))
        rows.append(row)
    return rows


def table(names: list[str], titles: list[str], rows: list[list[float]]) -> str:
    """The figures as a Markdown table with a line of means."""
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    cells = [["task", *titles], *([name, *map("{:.1f}".format, row)] for name, row in zip(names, rows, strict=True))]
    cells.append(["mean", *map("{:.1f}".format, means)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main() -> None:
    """Merge if no merged folder is given, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", nargs="*", type=Path, help="merged adapter folders; none: make the merges here")
    parser.add_argument("--data", type=Path, default=DATA, help="where fetched packages are kept")
    parser.add_argument("--split", choices=("test", "valid"), default="test", help="which texts to measure on")
    parser.add_argument("--texts", type=int, default=500, help="how many texts a task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapters = sorted(folder.parent for folder in ADAPTERS.glob("*/adapter_config.json"))
    names = [adapter.name for adapter in adapters]
    with tempfile.TemporaryDirectory() as scratch:
        columns = {str(folder): folder for folder in options.merged} or merge_all(adapters, Path(scratch))
        rows = measure(names, columns, options.data, options.split, options.texts)
    print(table(names, ["base", "own adapter", *columns], rows))


if __name__ == "__main__":
    main()
