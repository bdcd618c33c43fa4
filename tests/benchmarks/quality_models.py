"""The models of quality.py: fine-tunes of one small encoder, their merges, and the texts that they are asked."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import train_adapters
from encoder import Head, embed, load_encoder, zero_shot_head
from kept_answers import Right, Weights, digest, remembered
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from quality_entries import Entry
from quality_statistics import TaskEncoder, gather_statistics, merge_by_statistics
from tasks import MORE, TASKS, Task, load_task

import merging
from merging.statistics.writing import GatheredLayers

__all__ = ["LONGER", "LORA", "RANK", "RATES", "Judge", "Models", "trained"]

RATES = {"full": 6e-5, "lora": 1e-3}
LINEARS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # all six of each layer, and not the unused pooler
RANK = 16
LONGER = 10  # a model that outweighs the others: times as many steps
SEED = 11  # the first one of further models of a task
ORDERS = 3  # what depends on the order of the models is averaged over this many


def lora_config(rank: int) -> dict[str, Any]:
    """PEFT's settings of an adapter; what it adds is times 2 at each rank."""
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": LINEARS}


LORA = lora_config(RANK)


def trained(
    kind: str, task: Task, head: Head, steps: int, rate: float = 0.0, seed: int = 0, *, rank: int = RANK
) -> Weights:
    """The weights of a new fine-tune that differ from the base's, or the factors of a new LoRA, from a fixed seed."""
    start = time.perf_counter()
    seed = seed or list(TASKS | MORE).index(task.name) + 1  # two LoRAs of one seed would share what A spans
    torch.manual_seed(seed)
    encoder, tokenizer = load_encoder()
    base = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.get_input_embeddings().requires_grad_(False)
    model = get_peft_model(encoder, LoraConfig(**lora_config(rank))) if kind == "lora" else encoder
    # That script's own steps and rate are for its smaller adapters.
    train_adapters.STEPS, train_adapters.RATE = steps, rate or RATES[kind]
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

    def narrow(self, names: Sequence[str]) -> Judge:
        """The same with some of the tasks only."""
        narrowed = copy(self)
        narrowed.tasks = {name: self.tasks[name] for name in names}
        narrowed.asked = {split: {name: each[name] for name in names} for split, each in self.asked.items()}
        narrowed.heads = {name: self.heads[name] for name in names}
        return narrowed

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
    """The fine-tunes of one kind, and their merges.

    Args:
        kind: Full fine-tunes or LoRAs.
        judge: Its tasks are those of the models.
        steps: Steps of training.
        rank: Rank of the LoRAs.
        unequal: A task whose model is trained LONGER times as many steps.
        seeds: Models of each task, which differ by their seeds.
    """

    def __init__(
        self, kind: str, judge: Judge, steps: int, *, rank: int = RANK, unequal: str = "", seeds: int = 1
    ) -> None:
        found = []
        for name, task in judge.tasks.items():
            own_steps = steps * LONGER if name == unequal else steps
            folder = f"{kind}-{own_steps}" + (f"-rank{rank}" if kind == "lora" and rank != RANK else "")
            make = partial(trained, kind, task, judge.heads[name], own_steps, rank=rank)
            found.append(remembered(judge.work / folder / f"{name}.safetensors", make))
            found += [
                remembered(judge.work / folder / f"{name}-seed{seed}.safetensors", partial(make, seed=seed))
                for seed in range(SEED, SEED + seeds - 1)
            ]
        self._take(kind, judge, found, lora_config(rank))

    def _take(self, kind: str, judge: Judge, found: Sequence[Weights], config: Mapping[str, Any]) -> None:
        self.kind, self.states, self._judge = kind, found, judge
        self.config = {"peft_type": "LORA", **config} if kind == "lora" else None
        self._gathered: dict[int, list[GatheredLayers]] = {}
        # What no fine-tune touches (the embedding table, the pooler) takes no part in the merge.
        self.deltas = [merging.peft_deltas(state, self.config) for state in found] if self.config else []
        touched = {name for state in self.deltas or found for name in state}
        self.base = {name: tensor for name, tensor in judge.base.items() if name in touched}
        self.each = [self._add(delta) for delta in self.deltas] or [self.base | state for state in found]

    def norms(self) -> dict[str, float]:
        """The Frobenius norm of each model's change, by its task."""
        changes = ((state[name] - self.base[name] for name in self.base) for state in self.each)
        sums = [sum(change.square().sum().item() for change in each) for each in changes]
        return {name: total**0.5 for name, total in zip(self._judge.tasks, sums, strict=True)}

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
