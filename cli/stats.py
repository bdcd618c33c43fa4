"""``merge stats``: statistics of a model's layers on a few examples."""

from __future__ import annotations

from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .options import debug_option, device_option, json_option, overwrite_option, progress_option
from .output import echo, echo_json, echo_notices, format_size, plural, show_progress
from .types import MODEL

__all__ = ["stats_command"]


@click.command(name="stats", short_help="gather statistics of a model on examples, to merge by")
@click.argument("model", type=MODEL, metavar="MODEL")
@click.option(
    "--data",
    required=True,
    type=click.Path(),
    metavar="FILE|FOLDER",
    help="examples without labels: JSON lines, a text file with one a line, or a folder of images",
)
@click.option("-o", "--output", required=True, type=click.Path(), help="the file to write, .safetensors")
@click.option("--base", type=MODEL, help="the base of an adapter  [default: as it states]")
@click.option("--column", default="text", show_default=True, help="the field of JSON lines with the text")
@click.option("--examples", default=100, show_default=True, type=int, help="most examples that are read")
@click.option("--max-length", default=512, show_default=True, type=int, help="most tokens of an example")
@click.option("--max-tokens", type=int, help="most tokens of all examples  [default: no limit]")
@click.option("--directions", default=512, show_default=True, type=int, help="most directions that a layer keeps")
@click.option(
    "--fisher",
    type=click.Choice(["sampled", "labels"]),
    help="gather Fisher information too, of outputs drawn from the model's predictions, or of labels",
)
@click.option("--label-column", default="label", show_default=True, help="the field with the label")
@click.option("--seed", default=0, show_default=True, type=int, help="seed of outputs that are drawn")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="type to compute in")
@device_option
@overwrite_option
@progress_option
@json_option
@debug_option
def stats_command(model: str, progress: str | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Run a few examples through a model, and write statistics of its layers.

    \b
    merge stats one/ --data texts.jsonl -o one-stats.safetensors
    merge stats one/ --data texts.jsonl --fisher sampled -o one-stats.safetensors
    merge --method regmean --base BASE one/ two/ --stats one-stats.safetensors --stats two-stats.safetensors

    Some 30 to 100 unlabelled examples of the model's task are enough. The file goes with the model, which it knows by a
    key of its content. An adapter is run in its base.
    """
    status = OutputStatus(options["output"])
    with handle_errors(debug, status), show_progress(progress, "running examples") as show:
        import merging

        found = merging.collect_statistics(model, progress=show, **options)
    if as_json:
        echo_json(found.to_dict())
        return
    echo_notices(found.notices)
    tokens = f", {plural(found.tokens, 'token')}" if found.tokens else ""
    fisher = f" and Fisher information ({found.fisher})" if found.fisher else ""
    examples = f"{plural(found.examples, 'example')}{tokens}"
    size = f"{format_size(found.bytes)} in {found.seconds:.1f} s"
    echo(f"{found.path}: inputs of {plural(found.layers, 'layer')}{fisher} on {examples}, {size}")
