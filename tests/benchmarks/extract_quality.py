"""Accuracy of a fine-tune as a LoRA, by ranks and size; and of a LoRA whose intruder dimensions are reduced.

    python tests/benchmarks/extract_quality.py ranks
    python tests/benchmarks/extract_quality.py intruders --rate 3e-3

One task of quality.py, trained once and kept (--work). ``ranks`` extracts its full fine-tune with one rank for all
tensors, with the ranks of a budget of the same size, and by energy. ``intruders`` trains a LoRA with a high learning
rate: its forgetting is the accuracy on the tasks that it was not trained for, and the cosine of their features to the
base's. Rows with the whole LoRA scaled are the control.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from kept_answers import Weights, remembered
from quality_models import LORA, RATES, Judge, trained
from safetensors.torch import load_file, save_file
from speed import table
from tasks import DATA

import merging

TASKS = ("bbc", "movie", "spam", "wordnet", "names")


class Subject:
    """A model of one task next to its base on the disk, and its accuracy."""

    def __init__(self, judge: Judge, name: str, folder: Path) -> None:
        self.judge, self.name, self.folder, self.base = judge, name, folder, folder / "base"
        self.save_model("base", {})

    def save_model(self, place: str, weights: Weights) -> Path:
        """Save the base with these weights in place of its own."""
        self.judge.encoder.load_state_dict(self.judge.base | weights)
        self.judge.encoder.save_pretrained(self.folder / place)
        return self.folder / place

    def bake(self, lora: Path, **options: Any) -> Weights:
        """Return the weights of the base with a LoRA baked in."""
        baked = merging.bake([lora], base=self.base, output=self.folder / "baked", overwrite=True, **options)
        return load_file(baked.path / "model.safetensors")

    def accuracy(self, weights: Weights, names: tuple[str, ...] = ()) -> float:
        """Return the accuracy on the test texts of the task, or the mean over other tasks, in per cent."""
        names = names or (self.name,)
        right = self.judge.right(weights, "test", names)
        return 100 * statistics.fmean(float(right[name].mean()) for name in names)


def size_of(lora: Path) -> int:
    """Return the bytes of a LoRA's file."""
    return (lora / "adapter_model.safetensors").stat().st_size


def compare_ranks(subject: Subject, weights: Weights) -> None:
    """Print accuracy and error of a fine-tune as LoRAs of several ranks and sizes."""
    tuned = subject.save_model("tuned", weights)
    before, after = (load_file(path / "model.safetensors") for path in (subject.base, tuned))
    energy = {name: float((after[name] - each).double().square().sum()) for name, each in before.items()}

    def row(title: str, **options: Any) -> tuple[list[str], int]:
        made = merging.extract(tuned, base=subject.base, output=subject.folder / "lora", overwrite=True, **options)
        kept = [rank for rank in made.ranks.values() if rank]
        matrices = [name for name in energy if name in made.ranks]
        lost = sum(energy[name] * made.discarded.get(name, 1.0) for name in matrices)
        error = sqrt(lost / sum(energy[name] for name in matrices))
        size, accuracy = size_of(made.path), subject.accuracy(subject.bake(made.path))
        ranks = str(kept[0]) if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
        return [title, ranks, f"{size / 1e6:.2f} MB", f"{error:.3f}", f"{accuracy:.1f}"], size

    rows = []
    for rank in (2, 8, 32):
        uniform, size = row(f"`--rank {rank}`", rank=rank, uniform=True)
        rows += [uniform, row(f"`--size {size / 1e6:.2f}MB`", size=size)[0]]
    rows += [row(f"`--energy {energy_kept}`", energy=energy_kept)[0] for energy_kept in (0.5, 0.9)]
    rows.append(["full fine-tune", "-", "-", "0", f"{subject.accuracy(weights):.1f}"])
    rows.append(["base", "-", "-", "1", f"{subject.accuracy({}):.1f}"])
    print(table(["conditions", "ranks", "file", "relative error", f"accuracy on {subject.name}"], rows))


def compare_intruders(subject: Subject, factors: Weights) -> None:
    """Print what reducing the intruders of a LoRA costs on its task, and keeps of the other tasks."""
    lora = subject.folder / "lora"
    lora.mkdir()
    save_file(factors, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(subject.base), **LORA}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    others = tuple(name for name in subject.judge.tasks if name != subject.name)
    texts = [text for name in others for text, _ in subject.judge.asked["test"][name]]
    features = subject.judge.features

    def see(weights: Weights) -> torch.Tensor:
        subject.judge.encoder.load_state_dict(subject.judge.base | weights)
        with torch.no_grad():
            return features(texts)

    own = see({})

    def row(title: str, weights: Weights) -> list[str]:
        cosine = float((see(weights) * own).sum(-1).mean())
        return [title, f"{subject.accuracy(weights):.1f}", f"{subject.accuracy(weights, others):.1f}", f"{cosine:.3f}"]

    rows = [row("base", {}), row("LoRA", subject.bake(lora))]
    rows += [
        row(f"intruders times {factor:g}", subject.bake(lora, reduce_intruders={"factor": factor}))
        for factor in (0.75, 0.5, 0.0)
    ]
    made = merging.resize(lora, reduce_intruders=True, output=subject.folder / "resized")
    rows.append(row("intruders times 0.75, at its rank", subject.bake(made.path)))
    rows += [
        row(f"whole LoRA times {scale:g}", subject.bake(lora, weights=scale, method="task_arithmetic"))
        for scale in (0.75, 0.5)
    ]
    print(table(["", f"accuracy on {subject.name}", "on the other tasks", "cosine to the base's features"], rows))


def main() -> None:
    """Train what is missing, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ranks", "intruders"])
    parser.add_argument("--task", choices=TASKS, default="bbc")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 16 texts")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of the LoRA")
    parser.add_argument("--texts", type=int, default=500, help="test texts a task")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "merging-quality", help="what is kept")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # the sums of one thread come out the same on every run
    judge = Judge([chosen.task] if chosen.what == "ranks" else TASKS, chosen.work, DATA, 200, chosen.texts)
    kind, folder = ("full", "full") if chosen.what == "ranks" else ("lora", f"lora-at-{chosen.rate:g}")
    RATES["lora"] = chosen.rate
    task, head = judge.tasks[chosen.task], judge.heads[chosen.task]
    path = chosen.work / f"{folder}-{chosen.steps}" / f"{chosen.task}.safetensors"
    weights = remembered(path, lambda: trained(kind, task, head, chosen.steps))
    with tempfile.TemporaryDirectory() as name:
        subject = Subject(judge, chosen.task, Path(name))
        (compare_ranks if chosen.what == "ranks" else compare_intruders)(subject, weights)


if __name__ == "__main__":
    main()
