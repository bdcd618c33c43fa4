"""``merge search``: try merges on examples, and write the best."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .fields import FieldsCommand, field_option
from .options import (
    base_option,
    debug_option,
    dequantize_option,
    device_option,
    dtype_option,
    evaluation_options,
    json_option,
    kind_option,
    pop_engine,
    remember_quiet,
)
from .output import echo, echo_json, echo_notices, echo_usage
from .tables import echo_table
from .types import MODEL

__all__ = ["search_command"]


def settings_options(typed: Mapping[str, Any]) -> list[click.Option]:
    """Return the options of the settings of a search."""
    from merging.searches.settings import SearchSettings

    return [field_option(name, field) for name, field in SearchSettings.model_fields.items()]


@click.command(
    cls=FieldsCommand,
    fields=settings_options,
    name="search",
    short_help="try methods and scales on examples, and write the best merge",
)
@click.argument("models", nargs=-1, required=True, type=MODEL, metavar="MODEL... | RECIPE.yml")
@base_option
@click.option("--data", multiple=True, type=click.Path(), help="examples to choose by, as JSON lines; one file a task")
@click.option(
    "--test", multiple=True, type=click.Path(), help="examples to report on, one file a task; else nothing is concluded"
)
@click.option(
    "--score",
    metavar="COMMAND",
    help="instead of --data, a command that prints a number for a model, whose path is put in place of {} or behind it",
)
@click.option(
    "--candidate",
    "candidates",
    multiple=True,
    metavar="CHAIN:NAME=LOW..HIGH",
    help="a chain to try, with ranges (scale=0.2..1.5), choices (a|b) or ? for the usual range  [default: a few]",
)
@click.option("-o", "--output", default="found", show_default=True, type=click.Path(), help="the winner's folder")
@click.option("--overwrite", is_flag=True, help="replace an existing output, and an unfinished search")
@click.option("--resume", is_flag=True, help="go on with a search that was killed")
@kind_option
@click.option("--rank", type=int, help="rank of a merged adapter")
@click.option(
    "--stats",
    multiple=True,
    type=click.Path(),
    help="statistics of a model, from merge stats, for candidates such as regmean; repeated, one a model",
)
@click.option("--exclude", multiple=True, metavar="NAME", help="tensors that are left as in the base")
@dtype_option
@dequantize_option
@device_option
@evaluation_options
@json_option
@click.option(
    "--progress/--quiet",
    default=True,
    callback=remember_quiet,
    expose_value=False,
    help="print each candidate on stderr, or nothing but errors (and --json)  [default: each candidate]",
)
@debug_option
def search_command(models: tuple[str, ...], as_json: bool, debug: bool, fields: dict[str, Any], **options: Any) -> None:
    """Try methods and scales on examples, and write the best merge with its recipe and a report.

    \b
    merge search one/ two/ --base base/ --data valid.jsonl --test test.jsonl -o found/
    merge search one/ two/ --base base/ --score "python evaluate.py" --budget 30 -o found/

    An example is {"text": ..., "label": ...}, {"prompt": ..., "completion": ...} or {"text": ...}. Candidates are
    merged in memory and put into one loaded model; only the winner is written, or with --score every candidate for a
    while. The report (search.json, search.html) compares the winner with the base, the best single model, the plain
    average and task arithmetic. In a RECIPE.yml, parameters that are ranges or "?" are searched.
    """
    start = time.monotonic()

    def echo_trial(line: str) -> None:
        echo(f"[{time.monotonic() - start:.0f} s] {line}", err=True)

    output_status = OutputStatus(options["output"])

    def status() -> str:
        from merging.searches.workflow import checkpoint_folder

        resumable = not output_status.outputs() and checkpoint_folder(options["output"]).exists()
        return "the evaluations so far are kept, and --resume goes on with them" if resumable else output_status()

    with handle_errors(debug, status):
        import merging
        from merging.api.usage import describe_usage

        engine = pop_engine(options)
        stated = {name: value for name, value in options.items() if value not in (None, (), False)}
        found = merging.search(models, engine=engine, on_event=echo_trial, **stated, **fields)
        usage = describe_usage(found.path)
    if as_json:
        echo_json({**found.to_dict(), "usage": usage or None})
        return
    echo_notices(found.report.notices)
    echo_table(found.report.table(), flush_right=(1,))
    echo("")
    echo(f"{found.report.verdict}.")
    echo(f"{found.path}: {found.winner}, chosen of {found.report.facts['candidates']} candidates")
    echo_usage(usage)
