"""The only reader of recipe documents: YAML with the line of each value, so that errors state it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from merging.errors import FormatError, OptionError
from merging.plan.recipe_text import extract_yaml, replace_tabs
from merging.sources.plain_yaml import FAULTS, check_yaml

__all__ = ["Keys", "RecipeDocument", "parse_documents", "parse_value"]

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


def parse_documents(text: str, where: str) -> list[RecipeDocument]:
    """Read the mappings of a YAML text, which lines of ``---`` separate.

    Args:
        text: the YAML, as people leave it (:mod:`merging.plan.recipe_text`). Empty documents and prose are no recipes.
        where: the name of the text in errors.

    Returns:
        At least one document.

    Raises:
        FormatError: for a text that is not YAML, or without a mapping.
    """
    documents = []
    for value, node in _load_all(extract_yaml(text, where), where):
        if isinstance(value, dict):
            lines = {keys: f"{where}, line {line}" for keys, line in _lines((), node)}
            documents.append(RecipeDocument(value, {**lines, (): f"{where}, line {node.start_mark.line + 1}"}))
        elif isinstance(value, list):
            at = f"{where}, line {node.start_mark.line + 1}"
            raise FormatError(f"{at}: should be a YAML mapping with models and method, and is a list")
    if len(documents) == 1:  # the only one needs no place in the text
        return [RecipeDocument(documents[0].values, {**documents[0].origins, (): where})]
    if not documents:
        raise FormatError(f"{where}: should be a YAML mapping with models and method")
    return documents


def parse_value(text: str, where: str) -> Any:
    """Return one value as a document would have it. Raises :class:`~merging.errors.OptionError` for no valid YAML."""
    try:
        values = [value for value, _ in _load_all(text, where, lines=False)]
    except FormatError as error:
        raise OptionError(str(error)) from None
    if len(values) > 1:
        raise OptionError(f"{where}: is not one value: {text!r:.80}")
    return values[0] if values else None


def _load_all(text: str, where: str, *, lines: bool = True) -> Iterator[tuple[Any, yaml.Node]]:
    """Yield the value and the node of each document; an error states its line, where the text has ``lines``."""
    try:
        check_yaml(text, where)
        yield from _load(text)
    except FAULTS as error:
        if "\t" in text:
            yield from _load_all(replace_tabs(text, where), where, lines=lines)
            return
        mark = getattr(error, "problem_mark", None)
        place = where if mark is None or not lines else f"{where}, line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise FormatError(f"{place}: is not valid YAML: {problem}") from None
    except RecursionError:
        raise FormatError(f"{where}: is nested too deeply to be a recipe") from None


def _load(text: str) -> list[tuple[Any, yaml.Node]]:
    loader = _Loader(text)
    loaded = []
    while loader.check_node():
        node = loader.get_node()
        if node is not None:
            loaded.append((loader.construct_document(node), node))
    return loaded


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
