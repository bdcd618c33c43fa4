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
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import train_adapters
from encoder import Head, embed, load_encoder, zero_shot_head
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from quality_statistics import TaskEncoder, gather_statistics, merge_by_statistics
from speed import table
from tasks import DATA, MORE, TASKS, Task, load_task

import merging
from merging.statistics.writing import GatheredLayers

RATES = {"full": 6e-5, "lora": 1e-3}
LINEARS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # all six of each layer, and not the unused pooler
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": LINEARS}
ORDERS = 3  # what depends on the order of the models is averaged over this many
EXTRA = 6  # further points when the best one is at the edge of its grid
REFERENCE = "task arithmetic"

Weights = dict[str, Tensor]
Right = dict[str, Tensor]  # of each task: for each text, 1 where the answer is right (a mean over orders, if several)


def grid(start: float, stop: float, step: float) -> tuple[float, ...]:
    """Values from start to stop, both included."""
    return tuple(round(start + i * step, 6) for i in range(round((stop - start) / step) + 1))


@dataclass(frozen=True)
class Entry:
    """A row of the table: a chain of methods, its fixed parameters, and the one that is searched, if any."""

    title: str
    chain: str
    fixed: Mapping[str, Any]
    search: str = ""
    values: tuple[float, ...] = ()
    kinds: tuple[str, ...] = tuple(RATES)
    below: float = float("inf")  # what a searched value must stay below
    ordered: bool = False  # whether the order of the models matters
    texts: int = 0  # unlabelled texts of each task that it merges by

    def settings(self, value: float | None) -> dict[str, Any]:
        """Chain and parameters, the searched one at a value."""
        return {"method": self.chain, **self.fixed, **({self.search: value} if self.search else {})}


TENTHS, FIFTHS, QUARTERS = grid(0.1, 1.0, 0.1), grid(0.4, 2.2, 0.2), grid(1.0, 3.0, 0.25)
METHODS = (
    Entry("average", "linear", {}),
    Entry(REFERENCE, "task_arithmetic", {}, "scale", TENTHS),
    Entry("ties", "ties", {"density": 0.2}, "scale", FIFTHS),
    Entry("dare+ta", "dare+task_arithmetic", {"drop": 0.9}, "scale", TENTHS),
    Entry("dare+ties", "dare+ties", {"drop": 0.5, "density": 1.0}, "scale", FIFTHS),
    Entry("magmax", "magmax", {}, "scale", grid(0.2, 1.6, 0.2)),
    Entry("consensus", "consensus", {"threshold": 0.4, "agree": 2}, "scale", TENTHS),
    Entry("pcb", "pcb", {"ratio": 0.1}, "scale", grid(0.6, 2.4, 0.2)),
    Entry("pcb vision", "pcb", {"ratio": 0.1, "variant": "vision"}, "scale", grid(0.6, 2.4, 0.2)),
    Entry("lines", "lines", {}, "beta", TENTHS),
    Entry("larv", "larv", {}, "scale", TENTHS, ("full",)),
    Entry("larv+ties", "larv+ties", {"density": 0.2}, "scale", FIFTHS, ("full",)),
    Entry("lines+ties", "lines+ties", {"density": 0.2}, "beta", TENTHS),
    Entry("decouple+ties", "decouple+ties", {"density": 0.2}, "scale", FIFTHS),
    Entry("running sum 0.3", "task_arithmetic", {"scale": 0.3}),
    Entry("opcm 0.5", "opcm", {"alpha": 0.5}, ordered=True),
    Entry("opcm", "opcm", {}, "alpha", grid(0.1, 0.9, 0.2), below=1.0, ordered=True),
    Entry("varm", "varm", {}, "scale", grid(1.5, 3.0, 0.5)),
    Entry("sce", "sce", {}, "scale", grid(1.2, 2.4, 0.3)),
    Entry("sce deltas", "sce", {"select": "deltas"}, "scale", grid(2.0, 18.0, 2.0)),
    Entry("ram", "ram", {}, "scale", grid(1.5, 3.0, 0.5)),
    Entry("multislerp", "multislerp", {"space": "changes", "normalize": False}, "weights", grid(0.15, 0.3, 0.05)),
    Entry("karcher", "karcher", {"space": "changes"}),
    Entry("model_stock", "model_stock", {}),
    Entry("breadcrumbs+ta", "breadcrumbs+task_arithmetic", {}, "scale", grid(0.4, 0.8, 0.1)),
    Entry("breadcrumbs+ties", "breadcrumbs_ties", {}, "scale", grid(1.2, 2.1, 0.3)),
    Entry("della+ta", "della+task_arithmetic", {}, "scale", grid(0.3, 0.7, 0.1)),
    Entry("della+ties", "della+ties", {"ties.density": 1.0}, "scale", grid(0.9, 2.1, 0.3)),
    Entry("tsv", "tsv", {}, "scale", grid(0.6, 1.4, 0.2)),
    Entry("iso_c", "iso_c", {}, "scale", grid(0.75, 1.75, 0.25)),
    Entry("iso_cts", "iso_cts", {}, "scale", grid(0.75, 1.75, 0.25)),
    Entry("wudi", "wudi", {}, "scale", grid(0.6, 1.2, 0.2)),
    Entry("actmat", "actmat", {}, "scale", grid(0.2, 1.2, 0.2)),
    Entry("dc_merge", "dc_merge", {}, "scale", grid(0.9, 1.8, 0.3)),
    Entry("star", "star", {}, "scale", grid(1.0, 5.0, 1.0)),
    Entry("geometric_median", "geometric_median", {}, "scale", grid(1.0, 5.0, 1.0)),
    Entry("dop", "dop", {}, "alpha", grid(0.5, 0.9, 0.1), ordered=True),
    Entry("svc", "svc", {}, "alpha", (0.05, 0.1, 0.2, 0.5, 1.0)),
    Entry("svc+ties", "svc+ties", {"density": 0.2}, "alpha", (0.05, 0.1, 0.2, 0.5, 1.0)),
    Entry("clamp+ta", "clamp+task_arithmetic", {}, "scale", grid(0.4, 2.0, 0.4)),
    Entry("pico", "pico", {}, "norm", grid(1.0, 3.0, 0.5), ("lora",)),
    Entry("pico+ties", "pico+ties", {"density": 0.2}, "norm", grid(1.0, 3.0, 0.5), ("lora",)),
    Entry("pico+tsv", "pico+tsv", {}, "norm", grid(1.0, 3.0, 0.5), ("lora",)),
    Entry("ctm+ties", "ctm+ties", {"density": 0.25, "scope": "tensor"}, "scale", grid(0.5, 2.5, 0.5), ("lora",)),
    Entry("ctm+dare+ties", "ctm+dare+ties", {"drop": 0.3, "scope": "tensor"}, "scale", grid(0.5, 2.5, 0.5), ("lora",)),
    Entry("svd", "svd", {}, "scale", grid(0.4, 0.7, 0.1)),
    Entry("knots+ties", "knots+ties", {"density": 0.2}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
    Entry("knots+ties all", "knots+ties", {"density": 1.0}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
    Entry("core+ties", "core+ties", {"density": 0.2}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
    Entry("core+tsv", "core+tsv", {}, "scale", grid(0.6, 1.4, 0.2), ("lora",)),
    Entry("do", "do", {"steps": 100}, "scale", QUARTERS, ("lora",)),
    Entry("do 0 steps", "do", {"steps": 0}, "scale", QUARTERS, ("lora",)),
    Entry("orthogonalize+ta", "orthogonalize+task_arithmetic", {}, "scale", TENTHS, ("lora",)),
)
METHODS += tuple(
    Entry(f"{title} {texts} texts", method, fixed, "scale", scales, texts=texts)
    for title, method, fixed, scales in (
        ("regmean", "regmean", {}, grid(0.75, 1.75, 0.25)),
        ("esm", "esm", {}, grid(0.5, 2.5, 0.5)),
        ("esm polarized", "esm", {"polarize": 2.0}, grid(0.5, 2.5, 0.5)),
        ("fisher", "fisher", {}, grid(1.0, 4.0, 0.5)),
    )
    for texts in (32, 100)
)
# Written down before any test figure of the spectral methods was seen.
CHAINS = (
    Entry("lines+tsv", "lines+tsv", {}, "beta", grid(0.4, 1.0, 0.2)),
    Entry("lines+iso_c", "lines+iso_c", {}, "beta", grid(0.4, 3.2, 0.4)),
    Entry("lines+iso_cts", "lines+iso_cts", {}, "beta", grid(0.4, 1.0, 0.2)),
    Entry("lines+pcb", "lines+pcb", {"ratio": 0.1}, "beta", grid(0.6, 1.2, 0.2)),
    Entry("decouple+tsv", "decouple+tsv", {}, "scale", grid(0.6, 1.4, 0.2)),
    Entry("decouple+iso_c", "decouple+iso_c", {}, "scale", grid(0.75, 1.75, 0.25)),
    Entry("decouple+wudi", "decouple+wudi", {}, "scale", grid(0.6, 1.2, 0.2)),
    Entry("iso_cts half", "iso_cts", {"common": 0.5}, "scale", grid(1.0, 4.0, 0.5)),
    Entry("svd 0.7", "svd", {"energy": 0.7}, "scale", grid(0.4, 0.7, 0.1)),
    Entry("breadcrumbs+tsv", "breadcrumbs+tsv", {}, "scale", grid(0.8, 1.4, 0.2), ("full",)),
    Entry("breadcrumbs+iso_c", "breadcrumbs+iso_c", {}, "scale", grid(0.75, 1.75, 0.25), ("full",)),
    Entry("dare+tsv", "dare+tsv", {"drop": 0.5}, "scale", grid(0.6, 1.2, 0.2), ("full",)),
    Entry("knots+pcb", "knots+pcb", {"ratio": 0.1}, "scale", grid(0.8, 1.6, 0.2), ("lora",)),
    Entry("knots+sce", "knots+sce", {}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
    Entry("knots+magmax", "knots+magmax", {}, "scale", grid(0.8, 1.6, 0.2), ("lora",)),
    Entry("knots+consensus", "knots+consensus", {"threshold": 0.4}, "scale", grid(0.4, 0.8, 0.1), ("lora",)),
    Entry("core+pcb", "core+pcb", {"ratio": 0.1}, "scale", grid(0.8, 1.6, 0.2), ("lora",)),
    Entry("lines+knots+ties", "lines+knots+ties", {"density": 0.2}, "beta", grid(0.4, 1.0, 0.2), ("lora",)),
    Entry("orthogonalize+tsv", "orthogonalize+tsv", {}, "scale", grid(0.6, 1.4, 0.2), ("lora",)),
    Entry("orthogonalize+iso_c", "orthogonalize+iso_c", {}, "scale", grid(0.75, 1.75, 0.25), ("lora",)),
    Entry("orthogonalize+wudi", "orthogonalize+wudi", {}, "scale", grid(0.6, 1.2, 0.2), ("lora",)),
    Entry("orthogonalize+knots+ties", "orthogonalize+knots+ties", {}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
)


def digest(parts: Iterable[str | Tensor]) -> str:
    """A name for texts and tensors that changes with any of them."""
    found = hashlib.blake2b(digest_size=12)
    for part in parts:
        found.update(part.encode() + b"\0" if isinstance(part, str) else part.contiguous().numpy())
    return found.hexdigest()


def remembered(path: Path, make: Callable[[], Weights]) -> Weights:
    """What is in the file, or else what `make` gives, which is kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({name: tensor.detach().contiguous() for name, tensor in make().items()}, part)
        part.rename(path)
    return load_file(path)


def trained(kind: str, task: Task, head: Head, steps: int) -> Weights:
    """The weights of a new fine-tune that differ from the base's, or the factors of a new LoRA, from a fixed seed."""
    start = time.perf_counter()
    seed = list(TASKS | MORE).index(task.name) + 1  # of its own: two LoRAs of one seed would share what A spans
    torch.manual_seed(seed)
    encoder, tokenizer = load_encoder()
    base = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.get_input_embeddings().requires_grad_(False)
    model = get_peft_model(encoder, LoraConfig(**LORA)) if kind == "lora" else encoder
    train_adapters.STEPS, train_adapters.RATE = steps, RATES[kind]  # that script's own are for its smaller adapters
    train_adapters.train(model, tokenizer, head, task, seed)
    print(f"trained {kind} {task.name} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if kind == "lora":
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, base[name])}


class Judge:
    """The encoder with any weights, asked the texts of the tasks, all together so that batches are of one length."""

    def __init__(self, names: Sequence[str], work: Path, data: Path, valid: int, test: int) -> None:
        self.encoder, self.tokenizer = load_encoder()
        self.base = {name: tensor.clone() for name, tensor in self.encoder.state_dict().items()}
        self.work = work
        self.tasks = {name: load_task(name, data) for name in names}
        self.asked = {
            "valid": {name: task.valid[:valid] for name, task in self.tasks.items()},
            "test": {name: task.test[:test] for name, task in self.tasks.items()},
        }
        self.heads = {name: self._head(task) for name, task in self.tasks.items()}

    def _head(self, task: Task) -> Head:
        path = self.work / "heads" / f"{digest([*task.labels, *(text for text, _ in task.train[:500])])}.safetensors"
        return Head(**remembered(path, lambda: vars(zero_shot_head(self.encoder, self.tokenizer, task))))

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """In batches of the same number of tokens, since what is padded costs as much as the rest."""
        lengths = [len(tokens) for tokens in self.tokenizer(texts, truncation=True, max_length=64)["input_ids"]]
        order = sorted(range(len(texts)), key=lambda i: lengths[i])
        batches = [[texts[i] for i in order[start : start + 50]] for start in range(0, len(order), 50)]
        features = torch.cat([embed(self.encoder, self.tokenizer, batch) for batch in batches])
        return features[torch.tensor(order).argsort()]

    def right(self, weights: Weights, split: str, names: Sequence[str] = ()) -> Right:
        """Which texts (of some tasks only) are answered rightly by the base with these weights in place of its own."""
        asked = {name: self.asked[split][name] for name in names or self.tasks}
        heads = [tensor for name in asked for tensor in vars(self.heads[name]).values()]
        parts = [part for name in sorted(weights) for part in (name, weights[name])]
        path = self.work / "answers" / f"{digest([str(asked), *heads, *parts])}.safetensors"

        def ask() -> Right:
            self.encoder.load_state_dict(self.base | weights)
            features = self.features([text for examples in asked.values() for text, _ in examples])
            parts = zip(asked, features.split([len(examples) for examples in asked.values()]), strict=True)
            labels = {name: torch.tensor([label for _, label in examples]) for name, examples in asked.items()}
            return {name: self.heads[name](part).argmax(-1) == labels[name] for name, part in parts}

        return {name: each.double() for name, each in remembered(path, ask).items()}


class Models:
    """The fine-tunes of one kind, and their merges."""

    def __init__(self, kind: str, judge: Judge, steps: int) -> None:
        self._judge = judge
        self._gathered: dict[int, list[GatheredLayers]] = {}
        found = []
        for name, task in judge.tasks.items():
            path = judge.work / f"{kind}-{steps}" / f"{name}.safetensors"
            found.append(remembered(path, lambda task=task: trained(kind, task, judge.heads[task.name], steps)))
        # What no fine-tune touches (the embedding table, the pooler) takes no part in the merge.
        config = {"peft_type": "LORA", **LORA}
        self.deltas = [merging.peft_deltas(state, config) for state in found] if kind == "lora" else []
        touched = {name for state in self.deltas or found for name in state}
        self.base = {name: tensor for name, tensor in judge.base.items() if name in touched}
        self.each = [self._add(delta) for delta in self.deltas] or [self.base | state for state in found]

    def _add(self, deltas: Mapping[str, Any]) -> Weights:
        return {name: self.base[name] + delta.dense() for name, delta in deltas.items()}

    def _statistics(self, texts: int) -> list[GatheredLayers]:
        """Of each model on the first training texts of its task, without their labels."""
        if texts not in self._gathered:
            judge, found = self._judge, []
            for (name, task), weights in zip(judge.tasks.items(), self.each, strict=True):
                judge.encoder.load_state_dict(judge.base | weights)
                model = TaskEncoder(name, judge.encoder, judge.tokenizer, judge.heads[name])
                found.append(gather_statistics(model, [text for text, _ in task.train[:texts]], fisher=True))
            self._gathered[texts] = found
        return self._gathered[texts]

    def _merge_by(self, statistics: Sequence[GatheredLayers], entry: Entry, value: float | None) -> Weights:
        full = [{name: merging.Dense(state[name] - self.base[name]) for name in self.base} for state in self.each]
        settings = entry.settings(value)
        changes = merge_by_statistics(self.deltas or full, statistics, settings.pop("method"), settings)
        return {name: self.base[name] + change for name, change in changes}

    def merges(self, entry: Entry, value: float | None, seconds: list[float]) -> Iterable[Weights]:
        """The merge, or one of each order where that matters: as they are, and shuffled by fixed seeds."""
        for seed in range(ORDERS if entry.ordered else 1):
            models: list[Any] = list(self.deltas or self.each)
            if seed:
                random.Random(seed).shuffle(models)
            statistics = self._statistics(entry.texts) if entry.texts else []
            start = time.perf_counter()
            if statistics:
                merged = self._merge_by(statistics, entry, value)
            elif self.deltas:
                merged = self._add(merging.merge_deltas(models, **entry.settings(value)))
            else:
                merged = merging.merge_state_dicts(models, base=self.base, **entry.settings(value))
            seconds.append(time.perf_counter() - start)
            yield merged


def normalised(right: Right, alone: Right) -> float:
    """Accuracy over that of each task's own model, averaged over the tasks."""
    return 100 * statistics.fmean(right[name].mean().item() / alone[name].mean().item() for name in alone)


def best(points: Mapping[float, float]) -> float:
    """The value with the highest score, the smallest of several."""
    return max(sorted(points), key=lambda value: points[value])


def searched(entry: Entry, score: Callable[[float], float]) -> dict[float, float]:
    """Scores of the grid, which is continued while its best value is its first or its last: by its steps, or by halves
    where a step down would leave nothing."""
    points = {value: score(value) for value in entry.values}
    step = entry.values[1] - entry.values[0]
    for _ in range(EXTRA):
        chosen = best(points)
        lower = chosen - step if chosen > 1.5 * step else chosen / 2
        beyond = round(chosen + step if chosen == max(points) else lower, 6)
        if min(points) < chosen < max(points) or beyond >= entry.below:
            break
        points[beyond] = score(beyond)
    return dict(sorted(points.items()))


def edged(row: Mapping[str, Any]) -> str:
    """The value that was chosen; a star marks one that is still at the edge of its grid."""
    value, points = row.get("value"), row.get("validation")
    return "-" if value is None else f"{value:g}" + ("*" if points and value in (min(points), max(points)) else "")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as it is printed."""
    shown = [row["method"], edged(row), f"{row['score']:.1f}" if "score" in row else "-"]
    shown += [f"{row['accuracy']:.1f}", f"{row['normalised']:.1f}", f"{row['difference']:+.1f} ± {row['error']:.1f}"]
    return [*shown, f"{row['seconds']:.2f}" if "seconds" in row else "-"]


def paired(mine: Right, other: Right) -> tuple[float, float]:
    """Difference of two accuracies averaged over tasks, and its standard error over the same texts."""
    gaps = [100 * (mine[name] - other[name]) for name in mine]
    variance = sum(gap.var().item() / len(gap) for gap in gaps)
    return statistics.fmean(gap.mean().item() for gap in gaps), variance**0.5 / len(gaps)


class Trial:
    """One entry on its way: its answers, its value and score on the validation texts, and the seconds of its merges."""

    def __init__(self, entry: Entry, models: Models, judge: Judge, own: Right) -> None:
        self.entry, self._models, self._judge = entry, models, judge
        self._seconds: list[float] = []
        if entry.search:
            points = searched(entry, lambda value: normalised(self.right(value, "valid"), own))
            self.value: float | None = best(points)
            self.points, self.score = points, points[self.value]
        else:
            self.value, self.points = None, {}
            self.score = normalised(self.right(None, "valid"), own)

    def right(self, value: float | None, split: str) -> Right:
        """What the merge at a value answers rightly, averaged over the orders."""
        answers = [self._judge.right(merged, split) for merged in self._models.merges(self.entry, value, self._seconds)]
        return {name: torch.stack([each[name] for each in answers]).mean(0) for name in answers[0]}

    def told(self) -> dict[str, Any]:
        """What a row says about the search."""
        found = {"value": self.value, "validation": self.points or None, "score": self.score}
        return {**found, "seconds": statistics.median(self._seconds)}


def compare(kind: str, entries: Sequence[Entry], judge: Judge, steps: int) -> dict[str, Any]:
    """What every method reached in per cent, after the base and each task's own model; the scores of the chains on the
    validation texts; and what was chosen there, with what it reached on the test texts."""
    models = Models(kind, judge, steps)
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
    parser.add_argument("--kind", nargs="+", choices=list(RATES), default=list(RATES), help="what is merged")
    parser.add_argument("--methods", nargs="+", choices=titles, default=titles, help=f"only these, and {REFERENCE}")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 16 texts")
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
        entries = [entry for entry in wanted if kind in entry.kinds]
        found[kind] = compare(kind, entries, judge, chosen.steps)
        rows, chains = found[kind]["rows"], found[kind]["chains"]
        alone = [[name, *(f"{row['tasks'][name]:.1f}" for row in rows[:2])] for name in judge.tasks]
        print("\n" + table(["task", "base", f"its own {kind}"], alone), end="\n\n")
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
