"""``merge recycle``: adapters of other tasks, mixed for a new one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .fields import FieldsCommand, field_option
from .options import debug_option, device_option, evaluation_options, json_option, pop_engine, remember_quiet
from .output import echo, echo_json, echo_notices, echo_usage
from .tables import echo_table
from .types import MODEL

__all__ = ["recycle_command"]


def settings_options(typed: Mapping[str, Any]) -> list[click.Option]:
    """Return the options of the settings of recycling."""
    from merging.recycling.settings import Settings

    fields = dict(Settings.model_fields)
    rates = fields.pop("lora_rates").description
    several = click.Option(["--lora-rate", "lora_rates"], multiple=True, type=float, default=None, help=rates)
    return [*(field_option(name, field) for name, field in fields.items()), several]


@click.command(
    cls=FieldsCommand,
    fields=settings_options,
    name="recycle",
    short_help="mix adapters of other tasks into one LoRA for a new task",
)
@click.argument("pool", nargs=-1, required=True, type=MODEL, metavar="POOL...")
@click.option(
    "--base", type=MODEL, required=True, help="the model that the adapters belong to: a folder, or ORG/NAME on the Hub"
)
@click.option("--train", required=True, type=click.Path(), help="examples to tune on, as JSON lines; 100 will do")
@click.option("--valid", type=click.Path(), help="examples to stop and choose by  [default: a fifth of the others]")
@click.option("--test", type=click.Path(), help="examples that nothing is chosen on; without them nothing is concluded")
@click.option("-o", "--output", default="recycled", show_default=True, type=click.Path(), help="the adapter's folder")
@click.option("--overwrite", is_flag=True, help="replace an existing output, and an unfinished run")
@click.option("--resume", is_flag=True, help="go on with a run that was killed")
@device_option
@evaluation_options
@json_option
@click.option(
    "--progress/--quiet",
    default=True,
    callback=remember_quiet,
    expose_value=False,
    help="print the steps of the work on stderr, or nothing but errors (and --json)  [default: the steps]",
)
@debug_option
def recycle_command(pool: tuple[str, ...], as_json: bool, debug: bool, fields: dict[str, Any], **options: Any) -> None:
    """Pick adapters of other tasks, tune their mixture for a new task, and write it as one LoRA.

    \b
    merge recycle adapters/ --base BASE --train train.jsonl --test test.jsonl -o recycled/

    An example is {"text": ..., "label": ...} or {"prompt": ..., "completion": ...}. The report next to the adapter
    (recycling.json, recycling.html) compares it with the base, a LoRA trained on the same examples, the best single
    adapter, their simple average, and adapters that know nothing. POOL is a folder of adapters, a pool that
    merge pool built, or adapters by name.
    """
    start = time.monotonic()

    def echo_step(line: str) -> None:
        echo(f"[{time.monotonic() - start:.0f} s] {line}", err=True)

    output_status = OutputStatus(options["output"])

    def status() -> str:
        from merging.recycling.workflow import checkpoint_folder

        resumable = not output_status.outputs() and checkpoint_folder(options["output"]).exists()
        return "what is done so far is kept, and --resume goes on with it" if resumable else output_status()

    with handle_errors(debug, status):
        import merging
        from merging.api.usage import describe_usage

        engine = pop_engine(options)
        stated = {name: value for name, value in options.items() if value is not None}
        done = merging.recycle(pool, engine=engine, on_event=echo_step, **stated, **fields)
        usage = describe_usage(done.path)
    if as_json:
        echo_json({**done.to_dict(), "usage": usage or None})
        return
    echo_notices(done.report.notices)
    echo_table(done.report.table(), flush_right=(1, 2))
    echo("")
    echo(f"{done.report.verdict.sentence}.")
    echo(f"{done.path}: adapter of rank {done.rank}, {done.kept:.1%} of the mixture's energy kept")
    echo_usage(usage)
