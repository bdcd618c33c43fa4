"""``merge push``: publish a folder on the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import OutputStatus, handle_errors
from .options import debug_option, json_option, private_option
from .output import echo, echo_json

__all__ = ["push_command"]


@click.command(name="push", short_help="publish a folder on the Hub")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@private_option
@click.option("--overwrite", is_flag=True, help="replace the files of the repository, in a new commit")
@click.option("--message", help="the commit's message  [default: how it was merged]")
@json_option
@debug_option
def push_command(
    folder: Path, repository: str, private: bool, overwrite: bool, message: str | None, as_json: bool, debug: bool
) -> None:
    """Publish a merged model's or adapter's FOLDER on the Hub as one commit."""
    status = OutputStatus()
    with handle_errors(debug, status):
        from merging.errors import InputError
        from merging.hub.open_model import open_model
        from merging.hub.push import push, target_of

        if not folder.is_dir():
            raise InputError(f"{folder}: is not a folder: publish the folder of a model or an adapter")
        open_model(folder)  # a folder that is no model is not published
        target = target_of(repository, private=private, overwrite=overwrite)
        status.publishing = target.repo
        address = push(folder, target, message or f"Merged: {folder.name}")
    if as_json:
        echo_json({"path": str(folder), "published": address}, indent=None)
    else:
        echo(f"published as {address}")
