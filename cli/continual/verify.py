"""``merge continual verify``: hold a store against its manifest."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json, plural
from .options import store_argument

__all__ = ["verify_command"]


@click.command(name="verify", short_help="compare all files with the manifest")
@store_argument
@json_option
@debug_option
def verify_command(store: str, as_json: bool, debug: bool) -> None:
    """Hash all states and the base, and compare them with the manifest; exit code 1 if something is wrong."""
    with handle_errors(debug):
        from merging.continual import ContinualStore

        verdict = ContinualStore(store).verify()
    if as_json:
        echo_json(asdict(verdict))
    elif not verdict.problems:
        gone = f", states of {len(verdict.removed)} removed" if verdict.removed else ""
        echo(f"{store}: {plural(verdict.steps, 'model')}{gone}, all as it was written")
    for problem in verdict.problems if not as_json else ():
        echo(problem, err=True)
    if verdict.whole < verdict.steps and not as_json:
        back = f"merge continual rollback {store} --to {verdict.whole}"
        echo(f"step {verdict.whole} is the last whole state: go back to it with {back}", err=True)
    if verdict.problems:
        raise click.exceptions.Exit(1)
