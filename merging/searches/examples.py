"""The tasks of a search: examples to choose by, and examples to report on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merging.errors import FormatError, InputError, OptionError, option
from merging.recycling.data import Example, Split, read_examples
from merging.recycling.load_base import continues_prompts
from merging.recycling.seeds import order
from merging.searches.settings import Objective, SearchSettings

__all__ = ["ExampleSource", "SearchTask", "choose_metric", "read_tasks"]

ExampleSource = str | Path | Sequence[Mapping[str, Any]]
"""A file of JSON lines, or a list of mappings."""


@dataclass(frozen=True, slots=True)
class SearchTask:
    """One task: its name, the examples to choose by in a random order, and the examples to report on (may be none)."""

    name: str
    valid: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def split(self) -> Split:
        """The parts as a model takes them: classes are distinguished by the examples to choose by."""
        return Split(self.valid, self.valid, self.test)


def read_tasks(
    data: Sequence[ExampleSource], test: Sequence[ExampleSource], base: str, settings: SearchSettings
) -> tuple[SearchTask, ...]:
    """Read the examples of all tasks.

    Args:
        data: for each task its examples to choose by.
        test: for each task its examples to report on, in the same order; or none.
        base: the model that is loaded, which says whether texts alone are continued or classified.
        settings: the settings.

    Raises:
        MergingError: for wrong examples, tests of other tasks, and parts of different kinds.
    """
    if test and len(test) != len(data):
        raise OptionError(
            f"{len(data)} files of {option('data')} and {len(test)} of {option('test')}: give one of each for a task, "
            f"in the same order"
        )
    unlabelled = settings.metric == "entropy" and not continues_prompts(base)
    tasks: list[SearchTask] = []
    for number, source in enumerate(data):
        name = Path(source).stem if isinstance(source, (str, Path)) else f"task {number + 1}"
        parts = [read_examples(source, f"data, task {number + 1}")]
        parts += [read_examples(test[number], f"test, task {number + 1}")] if test else [()]
        if unlabelled:
            parts = [tuple(map(_as_text, part)) for part in parts]
        valid = parts[0]
        shuffled = tuple(valid[i] for i in order(len(valid), settings.seed, "search", number))
        tasks.append(SearchTask(name, shuffled, tuple(parts[1])))
    _check_tasks(tasks)
    return tuple(tasks)


def _as_text(example: Example) -> Example:
    """Return a text alone as an example of a classifier, whose label is never looked at."""
    if example.completion is not None and not example.text:
        return replace(example, text=example.completion, label=0, completion=None)
    return example


def _check_tasks(tasks: Sequence[SearchTask]) -> None:
    if not tasks:
        raise InputError("there is nothing to search by: give examples or a scoring command")
    kind = tasks[0].valid[0].kind
    for task in tasks:
        known = {each.label for each in task.valid}
        for each in (*task.valid, *task.test):
            if each.kind != kind:
                raise FormatError(f"{each.where}: has a {each.kind}, and the first example has a {kind}")
            if each.label not in known:
                raise FormatError(f"{each.where}: no example to choose by has the label {each.label!r}")


def choose_metric(tasks: Sequence[SearchTask], settings: SearchSettings) -> Objective:
    """Return the measure of a search. Raises :class:`~merging.errors.OptionError` for one that suits no such task."""
    completed = tasks[0].valid[0].completion is not None
    texts_alone = all(each.completion is not None and not each.text for task in tasks for each in task.valid)
    if settings.metric in ("perplexity", "exact_match") and not completed:
        raise OptionError(
            f"{option('metric', settings.metric)} is for prompts and completions: use accuracy or loss for labels"
        )
    if settings.metric != "auto":
        return settings.metric
    return "loss" if texts_alone else "accuracy"
