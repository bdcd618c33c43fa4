"""Text for model cards: YAML for the Hub, and Markdown in which names from files cannot act as markup."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from merging.errors import escape_unprintable
from merging.output.licences import Source

__all__ = ["card", "code", "code_block", "prose", "sources_listed"]

_MARKS = re.compile(r"[\\`*\[\]<>&|~!#$@]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//)", re.IGNORECASE)
"""Characters that Markdown may read as markup, an entity, or an address to link."""


def card(facts: Mapping[str, Any], title: str, parts: Sequence[str]) -> str:
    """Return a card: metadata, a heading, and parts of Markdown, one below the other.

    In these parts, text from files must pass through :func:`code`, :func:`prose` or :func:`code_block`.
    """
    head = yaml.safe_dump(_plain(facts), sort_keys=False)
    return "\n\n".join([f"---\n{head}---", f"# {title}", *parts]) + "\n"


def code(text: str) -> str:
    """Return a text as a span of code, with as many backticks around it as it needs."""
    text = escape_unprintable(text)
    fence = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def prose(text: str) -> str:
    """Return a text as part of a paragraph, with Markdown's markup escaped."""
    return _MARKS.sub(r"\\\g<0>", escape_unprintable(text))


def code_block(text: str, language: str) -> str:
    """Return lines as a block of code that no line can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{escape_unprintable(text, lines=True).rstrip()}\n{fence}"


def sources_listed(sources: Sequence[Source]) -> str:
    """Return the sources of a model, one a line, each with its license."""
    return "\n".join(
        f"- {f'{each.role}: ' if each.role else ''}{code(each.name)} (licence: {prose(each.licence or 'not stated')})"
        for each in sources
    )


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _plain(value: Any) -> Any:
    """Return metadata without line ends and control characters."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return escape_unprintable(value) if isinstance(value, str) else value
