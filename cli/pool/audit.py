"""``merge pool audit``: audit adapters of a pool again."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from .options import PoolStatus, pool_argument
from .verdicts import echo_entry, echo_verdicts

__all__ = ["audit_command"]


@click.command(name="audit", short_help="audit adapters again")
@pool_argument
@click.argument("names", nargs=-1, metavar="[NAME...]")
@json_option
@debug_option
def audit_command(pool: Path, names: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Audit adapters of the pool again, from where they came; without a NAME all of them.

    NAME is as `list` prints it, or the end of it.
    """
    with handle_errors(debug, PoolStatus(pool)):
        from merging.pool import Pool
        from merging.pool.audit import Candidate

        opened = Pool(pool)
        entries = [opened.index.entry(name) for name in names] or opened.index.entries()
        candidates = [Candidate(e.name, e.owner, e.created, e.downloads) for e in entries]
        built = opened.build(candidates, again=True, on_event=echo_entry)
    echo_verdicts(pool, built.verdicts, as_json)
