"""``merge pool list``: the adapters of a pool, one a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json
from .options import pool_argument
from .verdicts import format_reason

__all__ = ["list_command"]


@click.command(name="list", short_help="list all adapters, one a line")
@pool_argument
@click.option(
    "--verdict",
    "verdicts",
    multiple=True,
    type=click.Choice(["ok", "repaired", "quarantined", "rejected"]),
    help="only adapters of this verdict; may be repeated",
)
@json_option
@debug_option
def list_command(pool: Path, verdicts: tuple[Any, ...], as_json: bool, debug: bool) -> None:
    """List every adapter that was looked at: verdict, rank, norm relative to the base, and why."""
    with handle_errors(debug):
        from merging.pool import Pool
        from merging.pool.entry import VERDICTS

        entries = Pool(pool).index.entries(verdicts or VERDICTS)
    if as_json:
        echo_json([entry.to_dict() for entry in entries])
        return
    for entry in entries:
        size = f"{entry.figures.get('relative_norm', 0.0):.2%}" if entry.norm is not None else "-"
        echo(f"{entry.verdict:11} {entry.rank or '-':>4} {size:>8}  {entry.name}{format_reason(entry)}")
