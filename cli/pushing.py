"""``merge push``: publish a folder on the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import Placed, reported
from .output import echo, echo_json

__all__ = ["push_command"]


@click.command(name="push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="only you may see it, if it is new")
@click.option("--overwrite", is_flag=True, help="replace what the repository holds, in a new commit")
@click.option("--message", help="the commit's message  [default: how it was merged]")
@click.option("--json", "as_json", is_flag=True, help="print the outcome as JSON")
@click.option("--debug", is_flag=True, help="show a traceback with errors")
def push_command(
    folder: Path, repository: str, private: bool, overwrite: bool, message: str | None, as_json: bool, debug: bool
) -> None:
    """Publish a merged model's or adapter's FOLDER on the Hub as one commit."""
    standing = Placed()
    with reported(debug, standing):
        from merging.errors import InputError
        from merging.hub.open_model import open_model
        from merging.hub.push import push, target_of

        if not folder.is_dir():
            raise InputError(f"{folder}: is no folder: publish the folder of a model or an adapter")
        open_model(folder)  # what cannot be understood is not published
        target = target_of(repository, private=private, overwrite=overwrite)
        standing.publishing = target.repo
        address = push(folder, target, message or f"Merged: {folder.name}")
    if as_json:
        echo_json({"path": str(folder), "published": address}, indent=None)
    else:
        echo(f"published as {address}")
