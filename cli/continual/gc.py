"""``merge continual gc``: remove old states."""

from __future__ import annotations

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json, plural
from .options import StoreStatus, store_argument, wait_option

__all__ = ["gc_command"]


@click.command(name="gc", short_help="remove old states")
@store_argument
@click.option("--keep", type=int, required=True, help="the number of the last states that stay, to roll back to")
@wait_option
@json_option
@debug_option
def gc_command(store: str, keep: int, wait: float | None, as_json: bool, debug: bool) -> None:
    """Remove all states but the last ones, if the last one is whole."""
    with handle_errors(debug, StoreStatus(store)):
        from merging.continual import ContinualStore

        gone = ContinualStore(store).gc(keep, wait=wait)
    if as_json:
        echo_json({"removed": gone}, indent=None)
    else:
        echo(f"{store}: {plural(len(gone), 'state')} removed")
