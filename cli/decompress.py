"""``merge decompress``: the adapter or model that a pack holds."""

from __future__ import annotations

from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .options import debug_option, json_option, overwrite_option, progress_option
from .output import echo, echo_json, echo_notices, echo_usage, format_size, plural, show_progress
from .types import MODEL

__all__ = ["decompress_command"]


@click.command(name="decompress", short_help="write the model or adapter of a pack")
@click.argument("pack", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="a folder, or a file for a bare adapter")
@click.option("--base", type=MODEL, help="the model that the full model was trained from; adapters need none")
@click.option("--allow-different-bases", is_flag=True, help="add it to a base of other content than it was packed for")
@overwrite_option
@progress_option
@json_option
@debug_option
def decompress_command(pack: str, progress: str | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Write the content of a pack as an ordinary adapter, or as a full model.

    The tensors are the same, to the last bit, as when other commands read the pack.
    """
    with handle_errors(debug, OutputStatus(options["output"])):
        from merging.api.usage import describe_usage
        from merging.compression import decompress

        with show_progress(progress, "unpacking") as report:
            found = decompress(pack, progress=report, **options)
        usage = describe_usage(found.path)
    if as_json:
        echo_json({**found.to_dict(), "usage": usage or None})
        return
    echo_notices(found.notices)
    echo(f"{found.path}: {found.kind}, {plural(found.tensors, 'tensor')}, {format_size(found.bytes)}")
    echo_usage(usage)
