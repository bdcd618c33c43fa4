"""``merge formats``: the formats that are read, and how, and those that are refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .errors import handle_errors
from .options import json_option, markdown_option
from .output import echo_json, echo_text
from .tables import format_groups, format_legend

if TYPE_CHECKING:
    from merging.sources.formats import Format

__all__ = ["formats_command"]

BASE = {"no": "no", "some": "some variants", "sizes": "for its sizes", "yes": "yes", "": ""}

LEGEND = [
    (
        "read",
        "as factors: an adapter stays low-rank, and merges of sums lose nothing. In full: the change is computed when "
        "it is read; into an adapter it is cut to --rank, into a model it goes as it is. Mixed: as each method is",
    ),
    (
        "base",
        "whether an adapter's change can be computed without --base; to make a model, a base is always needed",
    ),
]


@click.command(name="formats", short_help="list the formats that are read or refused")
@json_option
@markdown_option
def formats_command(as_json: bool, markdown: bool) -> None:
    """List the formats of models and adapters that are read, and how, and those that are refused, and why."""
    with handle_errors():
        from merging.sources.formats import formats

        found = list(formats())
        if as_json:
            echo_json([asdict(each) for each in found])
        else:
            echo_text(_markdown(found) if markdown else _screen(found))


def _screen(formats: list[Format]) -> str:
    """Return all formats in columns, group by group, as wide as the terminal."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for each in formats:
        groups.setdefault(each.group, []).append((each.name, each.summary, each.read, BASE[each.base]))
    return "\n".join([*format_groups(groups, ["read", "base"]), *format_legend(LEGEND)])


def _markdown(found: list[Format]) -> str:
    lines = ["| format | what it holds | read | needs its base |", "|---|---|---|---|"]
    group = ""
    for each in found:
        if each.group != group:
            group = each.group
            lines.append(f"| **{group}** | | | |")
        lines.append(f"| {each.name} | {each.summary} | {each.read} | {BASE[each.base]} |")
    return "\n".join(lines)
