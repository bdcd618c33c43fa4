"""Examples of a task, as JSON lines: read and checked line by line, split and shuffled by a seed alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merging.errors import FormatError, InputError, nearest
from merging.recycling.seeds import order
from merging.sources.small_files import DATA_LIMIT, read_text

__all__ = ["Example", "Kind", "Split", "kind_of", "labels_of", "overlaps", "read_examples", "split"]

Kind = Literal["label", "completion"]
"""What is asked of a model: the label of a text, or what continues a prompt."""

_KNOWN = ("text", "label", "prompt", "completion")
_VALID_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Example:
    """One line: a ``text`` and its ``label``, or a prompt (``text``) and its ``completion``.

    ``where`` is the file and line that it came from, for messages.
    """

    text: str
    label: str | int | None
    completion: str | None
    where: str

    @property
    def kind(self) -> Kind:
        return "label" if self.completion is None else "completion"

    @property
    def content(self) -> tuple[str, str | int | None]:
        """What makes two examples the same."""
        return self.text, self.label if self.completion is None else self.completion


@dataclass(frozen=True, slots=True)
class Split:
    """The examples of a task: to tune on, to stop and choose by, and, if there are any, to report on."""

    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def shots(self) -> tuple[Example, ...]:
        """All that may be looked at: what single adapters are compared on."""
        return self.train + self.valid


def read_examples(source: str | Path | Sequence[Mapping[str, Any]], name: str = "examples") -> tuple[Example, ...]:
    """The examples of a file of JSON lines (blank ones are passed over) or of a list of mappings, all of one kind.

    Each is ``{"text", "label"}`` (a class), ``{"prompt", "completion"}`` (an answer), or ``{"text"}`` alone (all of
    it is to be predicted). Raises :class:`~merging.errors.FormatError` with the line, and
    :class:`~merging.errors.InputError` for a file that is not there.
    """
    if not isinstance(source, (str, Path)):
        return _alike([_example(values, f"{name}, number {i}") for i, values in enumerate(source, 1)], name)
    path = Path(source)
    lines = read_text(path, DATA_LIMIT, given=True).split("\n")
    numbered = [(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return _alike([_example(_parsed(line, where), where) for line, where in numbered], str(path))


def _alike(found: Sequence[Example], name: str) -> tuple[Example, ...]:
    if not found:
        raise FormatError(f"{name}: holds no examples")
    for each in found:
        if each.kind != found[0].kind:
            raise FormatError(f"{each.where}: has a {each.kind}, and those before have a {found[0].kind}")
    return tuple(found)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}: is no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise FormatError(f"{where}: is nested too deeply to be an example") from None


def _example(values: Any, where: str) -> Example:
    if not isinstance(values, Mapping):
        raise FormatError(f"{where}: should be an object with text and label, or prompt and completion")
    for name in map(str, values):
        if name not in _KNOWN:
            raise FormatError(
                f"{where}: there is no field {name!r}{nearest(name, _KNOWN)}: use text and label, or prompt and "
                f"completion"
            )
    if "prompt" in values or "completion" in values:
        if values.keys() != {"prompt", "completion"}:
            raise FormatError(f"{where}: prompt and completion go together, and with nothing else")
        return Example(_text(values, "prompt", where, True), None, _text(values, "completion", where), where)
    text = _text(values, "text", where)
    if "label" not in values:
        return Example("", None, text, where)
    label = values["label"]
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise FormatError(f"{where}: the label is {label!r}, and should be a name or a whole number")
    return Example(text, label, None, where)


def _text(values: Mapping[str, Any], name: str, where: str, empty: bool = False) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise FormatError(f"{where}: {name} is {value!r}, and should be a text")
    return value


def split(
    train: Sequence[Example], valid: Sequence[Example] | None, test: Sequence[Example] | None, seed: int
) -> Split:
    """The parts of a task. Without ``valid``, a fifth of the training examples (by seed) is kept for it.

    Raises :class:`~merging.errors.FormatError` for parts of different kinds and test labels that no other part has, and
    :class:`~merging.errors.InputError` for fewer than two examples.
    """
    if valid is None:
        shuffled = [train[i] for i in order(len(train), seed, "split")]
        held = max(1, round(len(train) * _VALID_SHARE))
        train, valid = shuffled[held:], shuffled[:held]
    if not train or not valid:
        raise InputError("there are too few examples: at least one to train on and one to validate on are needed")
    parts = Split(tuple(train), tuple(valid), tuple(test or ()))
    kind = parts.train[0].kind
    known = {each.label for each in parts.shots}
    for each in (*parts.valid, *parts.test):
        if each.kind != kind:
            raise FormatError(f"{each.where}: has a {each.kind}, and the training examples have a {kind}")
        if each.label not in known:
            raise FormatError(f"{each.where}: no training or validation example has the label {each.label!r}")
    return parts


def kind_of(parts: Split) -> Kind:
    """What is asked, the same in all parts."""
    return parts.train[0].kind


def labels_of(parts: Split) -> tuple[str | int, ...]:
    """The labels in use, numbers before names, each in order."""
    found = {each.label for each in parts.shots if each.label is not None}
    return tuple(sorted(found, key=lambda label: (isinstance(label, str), label)))


def overlaps(parts: Split) -> list[str]:
    """Remarks on examples that stand in two parts, and so make figures look better than they are."""
    seen = {each.content for each in parts.shots}
    held = {each.content for each in parts.valid}
    both = sum(each.content in held for each in parts.train)
    leaked = sum(each.content in seen for each in parts.test)
    remarks = [(both, "training", "validated"), (leaked, "test", "tuned or validated")]
    return [f"{count} {part} examples are also {use} on" for count, part, use in remarks if count]
