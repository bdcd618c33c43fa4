"""``merge pool plot``: a drawing of a pool."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import OutputStatus, handle_errors
from ..options import debug_option, drawing_option, overwrite_option
from ..output import echo
from .options import pool_argument

__all__ = ["plot_command"]


@click.command(name="plot", short_help="draw verdicts, ranks and norms")
@pool_argument
@drawing_option
@overwrite_option
@debug_option
def plot_command(pool: Path, output: str, overwrite: bool, debug: bool) -> None:
    """Draw verdicts, ranks, and norms relative to the base (needs matplotlib)."""
    with handle_errors(debug, OutputStatus(output)):
        from merging.pool import Pool
        from merging.pool.plot import plot

        plot(Pool(pool), output, overwrite)
    echo(output)
