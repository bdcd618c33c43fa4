"""``merge continual rollback``: go back to an earlier state."""

from __future__ import annotations

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json, plural
from .options import StoreStatus, store_argument, wait_option

__all__ = ["rollback_command"]


@click.command(name="rollback", short_help="go back to an earlier state")
@store_argument
@click.option("--to", type=int, required=True, help="the step to go back to; 0 is the empty store")
@wait_option
@json_option
@debug_option
def rollback_command(store: str, to: int, wait: float | None, as_json: bool, debug: bool) -> None:
    """Go back to the state after a step; later ones are forgotten.

    A watch that is started again adds their models once more, unless these have left the folder that it looks at.
    """
    with handle_errors(debug, StoreStatus(store)):
        from merging.continual import ContinualStore

        steps = len(ContinualStore(store).rollback(to, wait=wait).steps)
    if as_json:
        echo_json({"steps": steps}, indent=None)
    else:
        echo(f"{store}: {plural(steps, 'model')}")
