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
@click.argument("models", type=MODEL, metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(),
    metavar="FILE|FOLDER",
    help="examples without labels: JSON lines, a text file with one a line, or a folder of images",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help="the file to write, .safetensors; a folder for several",
)
@click.option("--base", type=MODEL, help="the base of an adapter, or of several models  [default: as adapters state]")
@click.option(
    "--through-merge",
    is_flag=True,
    help="gather statistics of several models block by block through their merge, with --data for each (RegMean++)",
)
@click.option("--off-diagonal", type=float, help="share that regmean is to keep, for --through-merge  [default: 0.9]")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="tensors that are not merged, for --through-merge")
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
def stats_command(
    models: tuple[str, ...], data: tuple[str, ...], progress: str | None, as_json: bool, debug: bool, **options: Any
) -> None:
    """Run a few examples through a model, and write statistics of its layers.

    \b
    merge stats one/ --data texts.jsonl -o one-stats.safetensors
    merge stats one/ --data texts.jsonl --fisher sampled -o one-stats.safetensors
    merge --method regmean --base BASE one/ two/ --stats one-stats.safetensors --stats two-stats.safetensors
    merge stats one/ two/ --data one.jsonl --data two.jsonl --base BASE --through-merge -o stats/

    Some 30 to 100 unlabelled examples of the model's task are enough. The file goes with the model, which it knows by a
    key of its content. An adapter is run in its base.
    """
    status = OutputStatus(options["output"])
    with handle_errors(debug, status), show_progress(progress, "running examples") as show:
        import merging

        if options.pop("through_merge"):
            alone = ["fisher", "label_column", "seed"]
            _refuse(alone, "goes with statistics of one model alone, without --through-merge")
            given = {name: value for name, value in options.items() if name not in alone and value not in (None, ())}
            found = merging.collect_merged_statistics(models, data, progress=show, **given)
        else:
            _refuse(["off_diagonal", "exclude"], "is for statistics of several models: use it with --through-merge")
            if len(models) > 1 or len(data) > 1:
                raise merging.OptionError(
                    f"{plural(len(models), 'model')} and {plural(len(data), 'file')} of examples: gather statistics of "
                    f"one model at a time, or of all through their merge with --through-merge"
                )
            given = {name: value for name, value in options.items() if name not in ("off_diagonal", "exclude")}
            found = (merging.collect_statistics(models[0], data[0], progress=show, **given),)
    if as_json:
        echo_json(found[0].to_dict() if len(models) == 1 else [each.to_dict() for each in found])
        return
    echo_notices([notice for each in found for notice in each.notices])
    for each in found:
        tokens = f", {plural(each.tokens, 'token')}" if each.tokens else ""
        fisher = f" and Fisher information ({each.fisher})" if each.fisher else ""
        examples = f"{plural(each.examples, 'example')}{tokens}"
        size = f"{format_size(each.bytes)} in {each.seconds:.1f} s"
        echo(f"{each.path}: inputs of {plural(each.layers, 'layer')}{fisher} on {examples}, {size}")


def _refuse(names: list[str], why: str) -> None:
    """Refuse options that were given. Raises :class:`~merging.errors.OptionError`."""
    from merging.errors import OptionError

    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise OptionError(f"--{name.replace('_', '-')} {why}")
