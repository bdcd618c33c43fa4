"""``merge continual relocate``: note where the base is now."""

from __future__ import annotations

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json
from ..types import MODEL
from .options import StoreStatus, store_argument, wait_option

__all__ = ["relocate_command"]


@click.command(name="relocate", short_help="note where the base is now")
@store_argument
@click.option("--base", type=MODEL, required=True, help="where the base is now")
@wait_option
@json_option
@debug_option
def relocate_command(store: str, base: str, wait: float | None, as_json: bool, debug: bool) -> None:
    """Note that the base was moved; its files must have the same bytes. A store itself may move freely."""
    with handle_errors(debug, StoreStatus(store)):
        from merging.continual import ContinualStore

        path = ContinualStore(store).relocate(base, wait=wait).base.path
    if as_json:
        echo_json({"base": path}, indent=None)
    else:
        echo(f"{store}: the base is {path}")
