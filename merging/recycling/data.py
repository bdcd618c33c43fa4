"""Examples of a task, as JSON lines: read and checked line by line, split and shuffled by a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merging.errors import FormatError, InputError, nearest
from merging.recycling.seeds import order
from merging.sources.small_files import DATA_LIMIT, read_text

__all__ = ["Example", "Split", "TaskKind", "kind_of", "labels_of", "overlaps", "read_examples", "split"]

TaskKind = Literal["label", "completion"]
"""The task of a model: predict the label of a text, or continue a prompt."""

_KNOWN = ("text", "label", "prompt", "completion")
_VALID_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Example:
    """One example: a ``text`` and its ``label``, or a prompt (``text``) and its ``completion``.

    ``where`` is its file and line, for messages.
    """

    text: str
    label: str | int | None
    completion: str | None
    where: str

    @property
    def kind(self) -> TaskKind:
        return "label" if self.completion is None else "completion"

    @property
    def content(self) -> tuple[str, str | int | None]:
        """The values in which equal examples agree."""
        return self.text, self.label if self.completion is None else self.completion


@dataclass(frozen=True, slots=True)
class Split:
    """The examples of a task: to tune on, to stop and choose by, and to report on (may be empty)."""

    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def shots(self) -> tuple[Example, ...]:
        """Training and validation examples: single adapters are compared on them."""
        return self.train + self.valid


def read_examples(source: str | Path | Sequence[Mapping[str, Any]], name: str = "examples") -> tuple[Example, ...]:
    """Read the examples of a task, all of one kind.

    An example is ``{"text", "label"}`` (a class), ``{"prompt", "completion"}`` (an answer), or ``{"text"}`` alone (the
    whole text is predicted).

    Args:
        source: A file of JSON lines, in which blank lines are ignored, or a list of mappings.
        name: The name of a list, for messages.

    Returns:
        The examples in their order.

    Raises:
        merging.errors.FormatError: For a wrong example, with its line.
        merging.errors.InputError: For a file that does not exist.
    """
    if not isinstance(source, (str, Path)):
        return _check_alike([_example(values, f"{name}, number {i}") for i, values in enumerate(source, 1)], name)
    path = Path(source)
    lines = read_text(path, DATA_LIMIT, given=True).split("\n")
    numbered = [(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return _check_alike([_example(_parse(line, where), where) for line, where in numbered], str(path))


def _check_alike(found: Sequence[Example], name: str) -> tuple[Example, ...]:
    if not found:
        raise FormatError(f"{name}: holds no examples")
    for each in found:
        if each.kind != found[0].kind:
            raise FormatError(f"{each.where}: has a {each.kind}, and those before have a {found[0].kind}")
    return tuple(found)


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise FormatError(f"{where}: is nested too deeply to be an example") from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        raise FormatError(f"{where}: holds a number that is too long to be read") from None


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
    if isinstance(label, str):
        _check_unicode(label, f"{where}: label")
    return Example(text, label, None, where)


def _text(values: Mapping[str, Any], name: str, where: str, empty: bool = False) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise FormatError(f"{where}: {name} is {value!r}, and should be a text")
    _check_unicode(value, f"{where}: {name}")
    return value


def _check_unicode(value: str, where: str) -> None:
    if value.encode(errors="replace").decode() != value:
        raise FormatError(f"{where} holds half a character, which is not valid Unicode")


def split(
    train: Sequence[Example], valid: Sequence[Example] | None, test: Sequence[Example] | None, seed: int
) -> Split:
    """Return the parts of a task. Without ``valid``, a fifth of the training examples (by seed) is set apart.

    Raises :class:`~merging.errors.FormatError` for parts of different kinds and for test labels without a training
    example, and :class:`~merging.errors.InputError` for fewer than two examples.
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


def kind_of(parts: Split) -> TaskKind:
    """Return the task, which is the same in all parts."""
    return parts.train[0].kind


def labels_of(parts: Split) -> tuple[str | int, ...]:
    """Return the labels in use, numbers before names, each in order."""
    found = {each.label for each in parts.shots if each.label is not None}
    return tuple(sorted(found, key=lambda label: (isinstance(label, str), label)))


def overlaps(parts: Split) -> list[str]:
    """Return remarks on examples in two parts, which make figures look better than they are."""
    seen = {each.content for each in parts.shots}
    held = {each.content for each in parts.valid}
    both = sum(each.content in held for each in parts.train)
    leaked = sum(each.content in seen for each in parts.test)
    remarks = [(both, "training", "validated"), (leaked, "test", "tuned or validated")]
    return [f"{count} {part} examples are also {use} on" for count, part, use in remarks if count]
