"""``merge pool stats``: figures of a pool."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo_json, format_size
from ..tables import echo_table
from .options import pool_argument

__all__ = ["stats_command"]


@click.command(name="stats", short_help="count the pool's adapters")
@pool_argument
@json_option
@debug_option
def stats_command(pool: Path, as_json: bool, debug: bool) -> None:
    """Count the pool's adapters: verdicts, reasons, owners, ranks, licences, sizes."""
    with handle_errors(debug):
        from merging.pool import Pool
        from merging.pool.stats import stats

        facts = stats(Pool(pool))
    if as_json:
        echo_json(facts)
        return
    rows = []
    for key, value in facts.items():
        text = ", ".join(f"{name}: {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)
        rows.append((key, format_size(value) if key == "bytes" else text))
    echo_table(rows)
