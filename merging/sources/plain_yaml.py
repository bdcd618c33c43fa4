"""YAML of strangers: deep nesting, growth by aliases and invalid Unicode are refused before the values are built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from merging.errors import FormatError

__all__ = ["FAULTS", "check_yaml", "load_yaml"]

_DEPTH = 64
"""How deep lists and mappings may be nested."""

_NODES = 1 << 20
"""The largest number of values in one text; each alias counts with all values that it stands for."""

FAULTS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""Errors of the library for a text that is not YAML, or that holds invalid numbers and dates."""

_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str, where: str) -> Any:
    """Return the values of a YAML text.

    Raises :class:`~merging.errors.FormatError` for a text that :func:`check_yaml` refuses, and one of :data:`FAULTS`
    for a text that is not YAML.
    """
    check_yaml(text, where)
    return yaml.load(text, _Parser)


def check_yaml(text: str, where: str) -> None:
    """Refuse a text that would take far more memory or time than its size suggests, or cannot be written again.

    The key ``<<`` copies all keys of an alias, so that a few lines can double to any size. Raises
    :class:`~merging.errors.FormatError`, and one of :data:`FAULTS` for a text that is not YAML.
    """
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    nodes = 0
    for event in _events(text, where):
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_nodes):
                raise FormatError(f"{where}: *{event.anchor} holds itself")
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if any("\ud800" <= each <= "\udfff" for each in event.value):
                raise FormatError(f"{where}: holds half a character, which is not valid Unicode")
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            nodes += 1
            open_nodes.append((event.anchor, nodes))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before + 1
        if len(open_nodes) > _DEPTH:
            raise FormatError(f"{where}: is nested too deeply")
        if nodes > _NODES:
            raise FormatError(f"{where}: holds more than {_NODES:,} values")


def _events(text: str, where: str) -> Iterator[Any]:
    try:
        yield from yaml.parse(text, _Parser)
    except yaml.MarkedYAMLError as error:
        if "invalid Unicode character escape" in str(error.problem):
            raise FormatError(f"{where}: holds half a character, which is not valid Unicode") from None
        raise
