"""``merge pool show``: all that is known of one adapter of a pool."""

from __future__ import annotations

from pathlib import Path

import click

from merging.errors import shorten

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json, format_size
from .options import pool_argument
from .verdicts import LONGEST_REASON

__all__ = ["show_command"]


@click.command(name="show", short_help="show all that was found of one adapter")
@pool_argument
@click.argument("name")
@json_option
@debug_option
def show_command(pool: Path, name: str, as_json: bool, debug: bool) -> None:
    """Show all that was found of one adapter; NAME is as `list` prints it, or the end of it."""
    with handle_errors(debug):
        from merging.pool import Pool

        entry = Pool(pool).index.entry(name)
    if as_json:
        echo_json(entry.to_dict())
        return
    echo(entry.name)
    facts = {key: value for key, value in entry.to_dict().items() if key not in ("name", "figures", "findings")}
    for key, value in {**facts, **entry.figures}.items():
        if value not in (None, ""):
            shown = format_size(value) if key == "size" else f"{value:.4g}" if isinstance(value, float) else value
            echo(f"  {key:18} {shorten(str(shown))}")
    for finding in entry.findings:
        echo(f"  {finding.stage:12} {finding.verdict}: {shorten(finding.reason, LONGEST_REASON)}")
