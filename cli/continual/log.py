"""``merge continual log``: the history of a store."""

from __future__ import annotations

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json
from ..tables import echo_table
from .options import store_argument
from .steps import describe_step

__all__ = ["log_command"]


@click.command(name="log", short_help="show the history of a store")
@store_argument
@json_option
@debug_option
def log_command(store: str, as_json: bool, debug: bool) -> None:
    """Show the history: every step, the newest first."""
    with handle_errors(debug):
        from merging.continual import ContinualStore

        opened = ContinualStore(store)
        steps, restorable = opened.log(), opened.restorable_steps()
    if as_json:
        echo_json([{**step.model_dump(), "restorable": step.number in restorable} for step in steps])
        return
    for step in steps:
        removed = "" if step.number in restorable else "  (its state was removed)"
        echo(f"step {step.number}  {step.time}{removed}")
        notices = [f"note: {notice}" for notice in step.notices]
        echo_table(
            [
                ("", line)
                for line in (f"{step.source} ({step.kind}, sha256 {step.sha256[:16]})", describe_step(step), *notices)
            ]
        )
