"""``merge clean``: leftovers of runs that were killed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from .errors import handle_errors
from .options import debug_option, json_option
from .output import echo, echo_json
from .tables import echo_table

if TYPE_CHECKING:
    from merging.storage.leftovers import Leftover
    from merging.storage.store_destination import StoreLeftover

__all__ = ["clean_command"]


@click.command(name="clean", short_help="list or remove what killed runs left")
@click.argument("folders", nargs=-1, type=click.Path(), metavar="[FOLDER]...")
@click.option("--remove", is_flag=True, help="remove everything that is listed")
@json_option
@debug_option
def clean_command(folders: tuple[str, ...], remove: bool, as_json: bool, debug: bool) -> None:
    """List what killed runs left in FOLDERs, the working folder by default.

    \b
    merge clean
    merge clean models/ /scratch --remove
    merge clean s3://bucket/merged --remove

    A run builds its output in a hidden folder next to its destination, which stays when the run is killed. The same
    command goes on with it if it says so here, and removes it otherwise. With --remove it is removed now; an output
    that was to be replaced is moved back first. Folders of living runs are never touched.

    In an object store, FOLDER is the address of an output, or of the folder of several. Uploads that are not complete
    are aborted, and a complete output is put in place. Runs that live on this machine are not touched. Nothing
    shows whether a run on another machine lives.
    """
    with handle_errors(debug):
        from merging.display.tables import format_size
        from merging.storage.store_destination import StoreLeftover

        found = [each for folder in dict.fromkeys(folders or (".",)) for each in _find(folder)]
        for each in found if remove else ():
            each.remove()
        if as_json:
            return echo_json({"leftovers": [each.to_dict() for each in found], "removed": remove})
        if not found:
            return echo("no killed run left anything")
        rows = []
        for each in found:
            use = "the same command goes on with it" if each.resumable else "of no use"
            if each.holds_old:
                use = "holds the output that was to be replaced, which is moved back"
            if isinstance(each, StoreLeftover) and each.whole:
                use = "is complete, and is put in place"
            when = datetime.fromtimestamp(each.modified).strftime("%Y-%m-%d %H:%M")
            done = "put in place" if isinstance(each, StoreLeftover) and each.whole else "removed"
            rows.append((str(each.path), format_size(each.bytes), when, done if remove else use))
        echo_table([("leftover", "size", "last change", ""), *rows])
        if not remove:
            echo(f"{shlex.join(['merge', 'clean', *folders, '--remove'])} removes them")
        return None


def _find(folder: str) -> Sequence[Leftover | StoreLeftover]:
    """Return what killed runs left in a folder, or at an address."""
    from merging.object_stores.store_path import StorePath, output_path
    from merging.storage.leftovers import find_leftovers
    from merging.storage.store_destination import find_store_leftovers

    place = output_path(folder)
    return find_store_leftovers(str(place)) if isinstance(place, StorePath) else find_leftovers(place)
