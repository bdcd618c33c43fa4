"""Merges of models on the Hub or in folders, in memory and in one loaded network: what vision.py and llm.py share."""

from __future__ import annotations

import argparse
import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kept_answers import Right, digest, remembered
from quality_entries import CHAINS, METHODS, REFERENCE, Entry
from quality_trials import compare, show
from speed import table
from torch import Tensor, nn

from merging.pool.network_weights import NetworkWeights
from merging.searches.memory_merger import MemoryMerger, MergeInputs
from merging.searches.spaces import MergeCandidate

__all__ = ["ENTRIES", "HubJudge", "HubModels", "make_parser", "run_protocol"]

ORDERS = 3  # methods that depend on the order of the models are averaged over this many
BASE = MergeCandidate("base", None, {}, ())
ENTRIES = tuple(entry for entry in (*METHODS, *CHAINS) if not entry.texts)  # the others need texts of quality.py


class HubModels:
    """The models of the tasks, one each, and their merges. A merge is made when its weights are loaded.

    Args:
        kind: Full fine-tunes or LoRAs.
        sources: The model of each task: a name on the Hub, or a folder.
        base: The base model of all: a name on the Hub, or a folder.
        network: The base, loaded; it holds a merge at a time.
    """

    def __init__(self, kind: str, sources: Mapping[str, str], base: str, network: nn.Module) -> None:
        self.kind = kind
        self.each = [MergeCandidate(name, "linear", {}, (slot,)) for slot, name in enumerate(sources)]
        # A model of images alone lacks the base's text model, which is no part of the merge.
        options = {"base": base, "on_mismatch": "base", "kind": "model"}
        inputs = MergeInputs(models=tuple(sources.values()), options=options)
        self._merger = MemoryMerger(inputs, next(network.parameters()).device)
        shapes = {item.site.name: item.site.shape for item in self._merger.reader.plan.items}
        self._weights = NetworkWeights(network, self._merger.merge(BASE), base, shapes, "use another transformers")
        self._network, self._loaded = network, BASE.key

    def load(self, candidate: MergeCandidate) -> None:
        """Put a merge into the network."""
        if candidate.key != self._loaded:
            self._loaded = ""
            self._weights.load(self._merger.merge(candidate))
            self._loaded = candidate.key

    def content(self) -> str:
        """A digest of the weights in the network."""
        own = dict(self._network.named_parameters(remove_duplicate=False))
        own |= dict(self._network.named_buffers(remove_duplicate=False))
        return digest(part for name in sorted(self._weights.names.values()) for part in (name, own[name]))

    def merges(self, entry: Entry, value: float | None, seconds: list[float]) -> Iterator[MergeCandidate]:
        """The merge, or one of each order where that matters: as they are, and shuffled by fixed seeds."""
        settings = entry.settings(value)
        chain = settings.pop("method")
        for seed in range(ORDERS if entry.ordered else 1):
            slots = list(range(len(self.each)))
            if seed:
                random.Random(seed).shuffle(slots)
            candidate = MergeCandidate(entry.title, chain, settings, tuple(slots))
            start = time.perf_counter()
            self.load(candidate)
            seconds.append(time.perf_counter() - start)
            yield candidate


class HubJudge(ABC):
    """Asks the network the examples of the tasks, and keeps the answers.

    Attributes:
        tasks: The names of the tasks.
        asked: The names of the splits.
        models: The models that are asked; set before the first question.
    """

    asked = ("valid", "test")

    def __init__(self, tasks: Sequence[str], work: Path) -> None:
        self.tasks, self._work = tasks, work
        self.models: HubModels

    @abstractmethod
    def identity(self, name: str, split: str) -> str:
        """A digest of the task's examples and of all else that decides the answers of given weights."""

    @abstractmethod
    def ask(self, name: str, split: str) -> Tensor:
        """For each example 1 where the network's answer is right, else 0; or a score between."""

    def right(self, weights: Any, split: str, names: Sequence[str] = ()) -> Right:
        """Which examples (of some tasks only) are answered rightly by a merge; {} is the base."""
        self.models.load(weights or BASE)
        content, found = self.models.content(), {}
        for name in names or self.tasks:
            path = self._work / "answers" / f"{digest([content, self.identity(name, split)])}.safetensors"
            kept = remembered(path, lambda name=name: {"right": self.ask(name, split)})
            found[name] = kept["right"].double()
        return found


def make_parser(description: str | None, work: str) -> argparse.ArgumentParser:
    """A parser of the options that both benchmarks have."""
    titles = [entry.title for entry in ENTRIES]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=Path, metavar="FOLDER", help="models and tasks of this folder's tasks.json")
    parser.add_argument("--methods", nargs="+", choices=titles, default=titles, help=f"only these, and {REFERENCE}")
    parser.add_argument("--fixed", type=float, help="the value of each method's parameter, instead of a search")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--batch", type=int, default=128, help="examples at once (%(default)s)")
    parser.add_argument("--limit", type=int, help="test examples a task (all)")
    parser.add_argument("--valid", type=int, default=200, help="validation examples a task (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / work, help="what is kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser


def run_protocol(chosen: argparse.Namespace, models: HubModels, judge: HubJudge) -> dict[str, Any]:
    """Compare the chosen methods, print the tables, and write them as JSON where that is asked."""
    judge.models = models
    entries = [each for each in ENTRIES if each.title in (REFERENCE, *chosen.methods) and models.kind in each.kinds]
    if chosen.fixed is not None:
        fixed = {each.title: {**each.fixed, each.search: chosen.fixed} for each in entries if each.search}
        entries = [replace(each, fixed=fixed.get(each.title, each.fixed), search="", values=()) for each in entries]
    found = compare(models, entries, judge)
    rows = found["rows"]
    heads = ["task", *(row["method"] for row in rows)]
    print("\n" + table(heads, [[name, *(f"{row['tasks'][name]:.1f}" for row in rows)] for name in judge.tasks]) + "\n")
    show(models.kind, found)
    if chosen.json:
        chosen.json.write_text(json.dumps({"settings": vars(chosen), **found}, indent=1, default=str))
    return found
