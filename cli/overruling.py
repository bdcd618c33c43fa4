"""``merge pool overrule``: a verdict of a person's own on adapters of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .errors import reported
from .output import echo, echo_json

__all__ = ["overrule_command"]


@click.command(name="overrule")
@click.argument("pool", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--as", "verdict", type=click.Choice(["ok", "quarantined"]), help="the verdict that counts instead")
@click.option("--reason", default="", help="why: kept beside the verdict")
@click.option("--undo", is_flag=True, help="let the findings count again")
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
@click.option("--debug", is_flag=True, help="show a traceback with errors")
def overrule_command(
    pool: Path, names: tuple[str, ...], verdict: Any, reason: str, undo: bool, as_json: bool, debug: bool
) -> None:
    """Give adapters a verdict of your own, with the reason; NAME as `list` prints it, or the end of it.

    It counts instead of all findings, and outlasts later audits, tests and comparisons.
    """
    with reported(debug):
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
