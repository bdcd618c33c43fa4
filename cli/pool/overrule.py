"""``merge pool overrule``: a person's own verdict on adapters of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json
from .options import pool_argument

__all__ = ["overrule_command"]


@click.command(name="overrule", short_help="give an adapter a verdict of your own")
@pool_argument
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--as", "verdict", type=click.Choice(["ok", "quarantined"]), help="the verdict that counts instead")
@click.option("--reason", default="", help="why: kept with the verdict")
@click.option("--undo", is_flag=True, help="let the findings count again")
@json_option
@debug_option
def overrule_command(
    pool: Path, names: tuple[str, ...], verdict: Any, reason: str, undo: bool, as_json: bool, debug: bool
) -> None:
    """Give adapters a verdict of your own, with the reason; NAME is as `list` prints it, or the end of it.

    It counts instead of all findings, and outlasts later audits, tests and comparisons.
    """
    with handle_errors(debug):
        from merging.errors import OptionError
        from merging.pool import Pool

        if undo == (verdict is not None):
            raise OptionError("which verdict? Use --as ok or --as quarantined, or --undo to take one back")
        opened = Pool(pool)
        opened.overrule(names, verdict, reason)
        entries = [opened.index.entry(name) for name in names]
    if as_json:
        echo_json([entry.to_dict() for entry in entries])
        return
    for entry in entries:
        echo(f"{entry.verdict:11} {entry.name}")
