"""``merge continual export``: the merge of all models so far."""

from __future__ import annotations

from typing import Any

import click

from ..errors import OutputStatus, handle_errors
from ..options import debug_option, dtype_option, json_option, overwrite_option, progress_option
from ..output import echo, echo_json, echo_notices, echo_usage, format_size, plural, show_progress
from .options import resource_options, store_argument

__all__ = ["export_command"]


@click.command(name="export", short_help="write the merge of all models so far")
@store_argument
@click.option("-o", "--output", required=True, type=click.Path(), help="a folder, or a file ending in .safetensors")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["model", "adapter"]),
    default="model",
    show_default=True,
    help="kind of the output",
)
@click.option("--rank", type=int, help="rank of the adapter  [default: the rank of the factors in the store]")
@dtype_option
@overwrite_option
@resource_options
@progress_option
@json_option
@debug_option
def export_command(store: str, output: str, progress: str | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Write the merge of all models so far, as a full model or as an adapter."""
    with handle_errors(debug, OutputStatus(output)):
        from merging.api.usage import describe_usage
        from merging.continual import ContinualStore

        with show_progress(progress) as report:
            merged = ContinualStore(store).export(output, progress=report, **options)
        usage = describe_usage(output)
    if as_json:
        echo_json({**merged.to_dict(), "usage": usage or None})
        return
    rank = f" of rank {merged.rank}" if merged.rank and merged.kind == "adapter" else ""
    echo(f"{output}: {merged.kind}{rank}, {plural(merged.tensors, 'tensor')}, {format_size(merged.bytes)}")
    echo_notices(merged.notices)
    echo_usage(usage)
