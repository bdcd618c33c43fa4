"""``merge formats``: what is read, how, and what is refused."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .errors import handle_errors
from .options import json_option
from .output import echo_json, echo_text

if TYPE_CHECKING:
    from merging.sources.formats import Format

__all__ = ["formats_command"]

BASE = {"no": "no", "some": "some variants", "sizes": "for its sizes", "yes": "yes", "": ""}

LEGEND = """\
read     as factors: an adapter stays low-rank, and merges of sums lose nothing. In full: the change is computed when it
         is read; into an adapter it is cut to --rank, into a model it goes as it is. Mixed: as each method is
base     whether --base is needed to tell what the adapter changes; to make a model it always is"""


@click.command(name="formats", short_help="the formats that are read, and those that are refused")
@json_option
@click.option("--markdown", is_flag=True, help="print the table of the documentation")
def formats_command(as_json: bool, markdown: bool) -> None:
    """List the formats of models and adapters: what is read, how, and what is refused and why."""
    with handle_errors():
        from merging.sources.formats import formats

        found = list(formats())
        if as_json:
            echo_json([asdict(each) for each in found])
        else:
            echo_text(_markdown(found) if markdown else _screen(found))


def _screen(found: list[Format]) -> str:
    lines: list[str] = []
    group = ""
    for each in found:
        if each.group != group:
            group = each.group
            lines += [*([""] if lines else []), f"{group:96} read        base"]
        name, summary = (
            textwrap.wrap(text, width, break_on_hyphens=False) for text, width in ((each.name, 30), (each.summary, 60))
        )
        ends = [f"{each.read:11} {BASE[each.base]}", *[""] * max(len(name), len(summary))]
        for i in range(max(len(name), len(summary))):
            left, middle = (part[i] if i < len(part) else "" for part in (name, summary))
            lines.append(f"  {left:31} {middle:61} {ends[i]}".rstrip())
    return "\n".join([*lines, "", LEGEND])


def _markdown(found: list[Format]) -> str:
    lines = ["| format | what it holds | read | needs its base |", "|---|---|---|---|"]
    group = ""
    for each in found:
        if each.group != group:
            group = each.group
            lines.append(f"| **{group}** | | | |")
        lines.append(f"| {each.name} | {each.summary} | {each.read} | {BASE[each.base]} |")
    return "\n".join(lines)
