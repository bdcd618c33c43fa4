"""``merge continual plot``: a drawing of a store's steps."""

from __future__ import annotations

import click

from ..errors import OutputStatus, handle_errors
from ..options import debug_option, drawing_option, overwrite_option
from ..output import echo
from .options import store_argument

__all__ = ["plot_command"]


@click.command(name="plot", short_help="draw figures over the steps")
@store_argument
@drawing_option
@overwrite_option
@debug_option
def plot_command(store: str, output: str, overwrite: bool, debug: bool) -> None:
    """Draw norms, kept shares, cosines and ranks over the steps (needs matplotlib)."""
    with handle_errors(debug, OutputStatus(output)):
        from merging.continual import ContinualStore

        ContinualStore(store).plot(output, overwrite)
    echo(output)
