"""``merge pool remove``: forget adapters of a pool."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json, plural
from .options import pool_argument
from .verdicts import echo_entry

__all__ = ["remove_command"]


@click.command(name="remove", short_help="forget adapters, and delete their files")
@pool_argument
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@json_option
@debug_option
def remove_command(pool: Path, names: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Forget adapters, delete their files, and compare the others again; NAME is as `list` prints it, or its end."""
    with handle_errors(debug):
        from merging.pool import Pool

        removed = Pool(pool).remove(names, on_event=echo_entry)
    if as_json:
        echo_json({"pool": str(pool), "removed": removed})
    else:
        echo(f"{pool}: {plural(len(removed), 'adapter')} removed")
