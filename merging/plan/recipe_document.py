"""The only reader of recipe documents: YAML with the line of each value, so that errors state it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from merging.errors import FormatError, OptionError
from merging.sources.plain_yaml import FAULTS, check_yaml

__all__ = ["Keys", "RecipeDocument", "parse_document", "parse_value"]

Keys: TypeAlias = tuple[str | int, ...]
"""The way to a value in a document: keys of mappings and indices of lists, from the outside in."""


@dataclass(frozen=True, slots=True)
class RecipeDocument:
    """The values of a document, and the origin of each.

    Attributes:
        values: plain values, in the document's own schema.
        origins: the place where each value stands (``merge.yml, line 3``) by its keys; of the document by ``()``.
    """

    values: dict[str, Any]
    origins: Mapping[Keys, str]

    def origin(self, keys: Keys) -> str:
        """Return the place of a value; a value that does not exist has the place of the values around it."""
        while keys not in self.origins:
            keys = keys[:-1]
        return self.origins[keys]


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, as one of the two would be lost, and 1:2 is not a number.

    To YAML 1.1 it is one of base 60; here it is a value that runs from block to block.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; an alias stands for a value or a list of values, as deeper ones can grow without end."""
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        if alias is not None and isinstance(node, yaml.CollectionNode):
            flat = isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value)
            if not flat or node.end_mark is None:
                raise yaml.composer.ComposerError(
                    None, None, f"*{alias.anchor} is not a list of values", alias.start_mark
                )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node, its keys each seen once."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unless_sexagesimal(construct: Callable[[_Loader, yaml.ScalarNode], Any]) -> Callable[..., Any]:
    return lambda loader, node: node.value if ":" in node.value else construct(loader, node)


_Loader.add_constructor(
    "tag:yaml.org,2002:timestamp", lambda loader, node: str(node.value)
)  # a name like a date is one
_Loader.add_constructor("tag:yaml.org,2002:int", _unless_sexagesimal(_Loader.construct_yaml_int))
_Loader.add_constructor("tag:yaml.org,2002:float", _unless_sexagesimal(_Loader.construct_yaml_float))


def parse_document(text: str, where: str) -> RecipeDocument:
    """Read a YAML mapping.

    Args:
        text: the YAML.
        where: the name of the document in errors.

    Raises:
        FormatError: for a text that is not a YAML mapping.
    """
    value, node = _load(text, where)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: should be a YAML mapping with models and method")
    lines = {keys: f"{where}, line {line}" for keys, line in _lines((), node)}
    return RecipeDocument(value, {**lines, (): where})


def parse_value(text: str, where: str) -> Any:
    """Return one value as a document would have it. Raises :class:`~merging.errors.OptionError` for no valid YAML."""
    try:
        return _load(text, where)[0]
    except FormatError as error:
        raise OptionError(str(error)) from None


def _load(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    try:
        check_yaml(text, where)
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except FAULTS as error:
        raise FormatError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise FormatError(f"{where}: is nested too deeply to be a recipe") from None


def _lines(keys: Keys, node: yaml.Node | None) -> Iterator[tuple[Keys, int]]:
    """Yield the line of each value, and of its key in a mapping, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*keys, str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _lines(inner, value)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*keys, index), value.start_mark.line + 1
            yield from _lines((*keys, index), value)
