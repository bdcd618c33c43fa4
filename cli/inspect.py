"""``merge inspect``: the content of models and adapters."""

from __future__ import annotations

import textwrap
from typing import Any

import click

from .errors import handle_errors
from .options import debug_option, json_option
from .output import echo, echo_json, format_size, terminal_width
from .tables import echo_table
from .types import MODEL

__all__ = ["inspect_command"]

_WIDEST, _LABEL = 110, 13
"""Characters of a line in a file or a pipe, and of the name of a fact."""

_MOST_SENTENCES = 3
"""Sentences that are printed of a list of them."""


@click.command(name="inspect", short_help="show the content of a model or adapter")
@click.argument("paths", nargs=-1, required=True, type=MODEL, metavar="PATH...")
@click.option("--values", is_flag=True, help="read all values too, and name tensors with NaN or infinities")
@click.option("--blocks", is_flag=True, help="list the blocks, as weights by block name them, with their elements")
@json_option
@debug_option
def inspect_command(paths: tuple[str, ...], values: bool, blocks: bool, as_json: bool, debug: bool) -> None:
    """Show the content of a model or adapter: kind, base, family, trainer, rank, modules, types, layers, size.

    Headers alone are read. With --json the output is a list with one entry a PATH.
    """
    with handle_errors(debug):
        from merging.api.inspect import inspect

        found = [inspect(path, values=values, blocks=blocks) for path in paths]
    if as_json:
        echo_json(found)
        return
    for facts in found:
        by_block = facts.pop("by_block", None)
        echo(facts.pop("path"))
        for name in ("family", "trainer"):
            evidence = facts.pop(f"{name}_evidence", None)
            if evidence:
                facts[name] += f" ({evidence})"
        for name, value in facts.items():
            if value not in (None, 0, [], {}, "") or name in ("nonfinite", "needs_base"):
                for line in _lines(name, value):
                    echo(line)
        if by_block:
            _echo_blocks(by_block)


def _echo_blocks(facts: dict[str, Any]) -> None:
    """Print a table of blocks, and the lists of numbers that stand for them."""
    rows = [
        ("", block["name"], f"{block['tensors']:,}", f"{block['parameters']:,}", _join_counts(block["elements"]))
        for block in facts["blocks"]
    ]
    echo_table([("", "block", "tensors", "parameters", "elements"), *rows], flush_right=(2, 3))
    for count, names in facts["lists"].items():
        echo(f"  {count} numbers of {facts['layout']}: {names}")


def _join_counts(elements: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in elements.items())


def _lines(name: str, value: Any) -> list[str]:
    """Return the lines of a fact, its name on the first."""
    width = (terminal_width() or _WIDEST) - _LABEL - 3
    sentences = value if name in ("notices", "needs_base") and value else [_text(name, value, 2 * width)]
    more = len(sentences) - _MOST_SENTENCES
    shown = [*sentences[:_MOST_SENTENCES], *([f"and {more} more"] if more > 0 else [])]
    lines = [line for each in shown for line in textwrap.wrap(each, width, break_on_hyphens=False)]
    labels = [name.replace("_", " "), *[""] * len(lines)]
    return [f"  {label:{_LABEL}} {line}" for label, line in zip(labels, lines, strict=False)]


def _text(name: str, value: Any, longest: int) -> str:
    """Return a fact as people read it; of a list as many items as there is room for."""
    if name.endswith("bytes"):
        return format_size(value)
    if isinstance(value, dict):
        return _join([f"{key}: {each:,}" for key, each in value.items()], longest)
    if isinstance(value, list):
        return _join([f"{each:.4g}" if isinstance(each, float) else str(each) for each in value], longest) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _join(items: list[str], longest: int) -> str:
    """Return the first items that fit, and the number of the others."""
    kept = items
    while len(", ".join(kept)) > longest and len(kept) > 1:
        kept = kept[:-1]
    more = len(items) - len(kept)
    return ", ".join(kept) + (f" and {more} more" if more else "")
