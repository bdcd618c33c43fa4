"""``merge inspect``: what is this file?"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import click

from .errors import handle_errors
from .options import debug_option, json_option
from .output import echo, echo_json, size_text
from .types import MODEL

__all__ = ["inspect_command"]

_LABEL, _WIDTH = 16, 110
_LISTED, _TOLD = 2 * (_WIDTH - _LABEL), 3
"""The letters that a list may take, and the sentences that are told."""


@click.command(name="inspect", short_help="the content of a model or adapter")
@click.argument("paths", nargs=-1, required=True, type=MODEL, metavar="PATH...")
@click.option("--values", is_flag=True, help="read all values too, and name tensors with NaN or infinities")
@json_option
@debug_option
def inspect_command(paths: tuple[str, ...], values: bool, as_json: bool, debug: bool) -> None:
    """Tell what a model or adapter is: kind, base, rank, modules, types, layers, size. Headers alone are read."""
    with handle_errors(debug):
        from merging.api.inspect import inspect

        found = [inspect(path, values=values) for path in paths]
    if as_json:
        echo_json(found)
        return
    for facts in found:
        echo(facts.pop("path"))
        for name, value in facts.items():
            if value not in (None, 0, [], {}, "") or name in ("nonfinite", "needs_base"):
                for line in _lines(name, value):
                    echo(line)


def _lines(name: str, value: Any) -> Iterator[str]:
    """A fact, its name before the first line."""
    sentences = value if name in ("notices", "needs_base") and value else [_text(name, value)]
    told = [*sentences[:_TOLD], *([f"and {len(sentences) - _TOLD} more"] if len(sentences) > _TOLD else [])]
    lines = [line for each in told for line in textwrap.wrap(each, _WIDTH - _LABEL, break_on_hyphens=False)]
    label = name.replace("_", " ")
    for line in lines:
        yield f"  {label:{_LABEL - 3}} {line}"
        label = ""


def _text(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return size_text(value)
    if isinstance(value, dict):
        return _listed([f"{key}: {each:,}" for key, each in value.items()])
    if isinstance(value, list):
        return _listed([f"{each:.4g}" if isinstance(each, float) else str(each) for each in value]) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _listed(items: list[str]) -> str:
    """As many items as there is room for."""
    kept = items
    while len(", ".join(kept)) > _LISTED and len(kept) > 1:
        kept = kept[:-1]
    more = len(items) - len(kept)
    return ", ".join(kept) + (f" and {more} more" if more else "")
