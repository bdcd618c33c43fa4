"""``merge pool list``: the adapters of a pool, one a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo_json, echo_text
from ..tables import echo_table, format_legend
from .options import pool_argument
from .verdicts import format_reason

if TYPE_CHECKING:
    from merging.pool import Entry

__all__ = ["list_command"]

LEGEND = [
    ("rank", "of the factors"),
    ("change", "norm of the adapter's change, as a share of the norm of the tensors that it changes"),
]

_HEADER = ("verdict", "rank", "change", "adapter")


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
    if entries:
        echo_table([_HEADER, *map(_row, entries)], flush_right=(1, 2))
        echo_text("\n".join(["", *format_legend(LEGEND)]))


def _row(entry: Entry) -> tuple[str, ...]:
    """Return an entry as a row of the table."""
    size = f"{entry.figures.get('relative_norm', 0.0):.2%}" if entry.norm is not None else "-"
    return entry.verdict, str(entry.rank or "-"), size, f"{entry.name}{format_reason(entry)}"
