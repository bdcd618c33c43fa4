"""``merge pool dedupe``: compare all adapters of a pool with each other."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from .options import license_option, owner_cap_option, pool_argument
from .verdicts import echo_entry, echo_verdicts

__all__ = ["dedupe_command"]


@click.command(name="dedupe", short_help="compare all adapters again")
@pool_argument
@owner_cap_option
@license_option
@json_option
@debug_option
def dedupe_command(
    pool: Path, owner_cap: int | None, allow_unknown_licence: bool | None, as_json: bool, debug: bool
) -> None:
    """Compare all adapters again: repeats, owners with too many, norms far from the others', licences."""
    with handle_errors(debug):
        from merging.pool import Pool

        verdicts = Pool(pool).dedupe(owner_cap, allow_unknown_licence, on_event=echo_entry)
    echo_verdicts(pool, verdicts, as_json)
