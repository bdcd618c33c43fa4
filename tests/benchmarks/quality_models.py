"""The models of quality.py: fine-tunes of one small encoder, their merges, and the texts that they are asked."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import train_adapters
from encoder import Head, embed, load_encoder, zero_shot_head
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from quality_entries import Entry
from quality_statistics import TaskEncoder, gather_statistics, merge_by_statistics
from tasks import MORE, TASKS, Task, load_task

import merging
from merging.statistics.writing import GatheredLayers

__all__ = ["LORA", "RATES", "Judge", "Models", "Right", "Weights", "remembered", "trained"]

RATES = {"full": 6e-5, "lora": 1e-3}
LINEARS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # all six of each layer, and not the unused pooler
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": LINEARS}
ORDERS = 3  # what depends on the order of the models is averaged over this many

Weights = dict[str, Tensor]
Right = dict[str, Tensor]  # of each task: for each text, 1 where the answer is right (a mean over orders, if several)


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
