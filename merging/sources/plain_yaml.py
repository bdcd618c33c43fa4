"""YAML of strangers: what is nested deeply, grows by its aliases, or is no Unicode is refused before it is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from merging.errors import FormatError

__all__ = ["FAULTS", "check_yaml", "load_yaml"]

_DEPTH = 64
"""How deep lists and mappings may be nested."""

_NODES = 1 << 20
"""Values in one text, each alias counted with all that it stands for."""

FAULTS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What the library raises for a text that is no YAML, or holds numbers and dates that are none."""

_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str, where: str) -> Any:
    """The values of a YAML text.

    Raises :class:`~merging.errors.FormatError` for one that :func:`check_yaml` refuses, and one of :data:`FAULTS` for
    one that is no YAML.
    """
    check_yaml(text, where)
    return yaml.load(text, _Parser)


def check_yaml(text: str, where: str) -> None:
    """Refuse a text that would take far more memory or time than it looks, or cannot be written again.

    A key ``<<`` takes in all keys of what an alias means, so that a few lines of them double to any size. Raises
    :class:`~merging.errors.FormatError`, and one of :data:`FAULTS` for what is no YAML.
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
                raise FormatError(f"{where}: holds half a character, which is no Unicode")
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
            raise FormatError(f"{where}: holds half a character, which is no Unicode") from None
        raise
