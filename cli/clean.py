"""``merge clean``: leftovers of runs that were killed."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from .errors import handle_errors
from .options import debug_option, json_option
from .output import echo, echo_json
from .tables import echo_table

__all__ = ["clean_command"]


@click.command(name="clean", short_help="list or remove what killed runs left")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER]...")
@click.option("--remove", is_flag=True, help="remove everything that is listed")
@json_option
@debug_option
def clean_command(folders: tuple[Path, ...], remove: bool, as_json: bool, debug: bool) -> None:
    """List what killed runs left in FOLDERs, the working folder by default.

    \b
    merge clean
    merge clean models/ /scratch --remove

    A run builds its output in a hidden folder next to its destination, which stays when the run is killed. The same
    command goes on with it if it says so here, and removes it otherwise. With --remove it is removed now; an output
    that was to be replaced is moved back first. Folders of living runs are never touched.
    """
    with handle_errors(debug):
        from merging.display.tables import format_size
        from merging.storage.leftovers import find_leftovers

        found = [each for folder in dict.fromkeys(folders or (Path(),)) for each in find_leftovers(folder)]
        for each in found if remove else ():
            each.remove()
        if as_json:
            fields = [{**asdict(each), "path": str(each.path), "output": str(each.output)} for each in found]
            return echo_json({"leftovers": fields, "removed": remove})
        if not found:
            return echo("no killed run left anything")
        rows = []
        for each in found:
            use = "the same command goes on with it" if each.resumable else "of no use"
            if each.holds_old:
                use = "holds the output that was to be replaced, which is moved back"
            when = datetime.fromtimestamp(each.modified).strftime("%Y-%m-%d %H:%M")
            rows.append((str(each.path), format_size(each.bytes), when, "removed" if remove else use))
        echo_table([("leftover", "size", "last change", ""), *rows])
        if not remove:
            echo("merge clean --remove removes them")
        return None
