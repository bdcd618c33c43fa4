"""``merge recycle``: adapters of other tasks, mixed for a new one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click

from .errors import Placed, reported
from .output import echo, echo_json, echo_notices

__all__ = ["recycle_command"]


class RecycleCommand(click.Command):
    """A command whose options include the fields of the settings, which pydantic brings along."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.own = list(self.params)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the settings' options in before the rest is read."""
        from merging.recycling.settings import Settings

        from .fields import field_option

        fields = dict(Settings.model_fields)
        rates = fields.pop("lora_rates").description
        several = click.Option(["--lora-rate", "lora_rates"], multiple=True, type=float, default=None, help=rates)
        self.params = [*self.own, *(field_option(name, field) for name, field in fields.items()), several]
        return super().parse_args(ctx, args)


@click.command(cls=RecycleCommand, name="recycle")
@click.argument("pool", nargs=-1, required=True, metavar="POOL...")
@click.option("--base", required=True, help="the model that the adapters belong to: a folder, or ORG/NAME on the Hub")
@click.option("--train", required=True, type=click.Path(), help="examples to tune on, as JSON lines; 100 will do")
@click.option("--valid", type=click.Path(), help="examples to stop and choose by  [default: a fifth of the others]")
@click.option("--test", type=click.Path(), help="examples that nothing is chosen on; without them nothing is concluded")
@click.option("-o", "--output", default="recycled", show_default=True, type=click.Path(), help="the adapter's folder")
@click.option("--overwrite", is_flag=True, help="replace an existing output, and an unfinished run")
@click.option("--resume", is_flag=True, help="go on with a run that was killed")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto")
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON")
@click.option("--progress/--quiet", default=True, help="tell on stderr what is being done  [default: yes]")
@click.option("--debug", is_flag=True, help="show a traceback with errors")
def recycle_command(pool: tuple[str, ...], as_json: bool, progress: bool, debug: bool, **options: Any) -> None:
    """Pick adapters of other tasks, tune how they are mixed for a new one, and write one LoRA.

    \b
    merge recycle adapters/ --base BASE --train train.jsonl --test test.jsonl -o recycled/

    An example is {"text": ..., "label": ...} or {"prompt": ..., "completion": ...}. The report beside the adapter
    (recycling.json, recycling.html) always holds it against the base, a LoRA trained on the same examples, the best
    single adapter, their simple average, and adapters that know nothing. POOL is a folder of adapters, a pool that
    merge pool built, or adapters by name.
    """
    start = time.monotonic()

    def show(line: str) -> None:
        if progress:
            echo(f"[{time.monotonic() - start:.0f} s] {line}", err=True)

    placed = Placed(options["output"])

    def standing() -> str:
        from merging.recycling.workflow import checkpoint_folder

        going = not placed.outputs() and checkpoint_folder(options["output"]).exists()
        return "what is done so far is kept, and --resume goes on with it" if going else placed()

    with reported(debug, standing):
        import merging

        stated = {name: value for name, value in options.items() if value not in (None, ())}
        done = merging.recycle(pool, on_event=show, **stated)
    if as_json:
        echo_json(done.to_dict())
        return
    echo_notices(done.report.notices)
    for line in _aligned(done.report.table()):
        echo(line)
    echo("")
    echo(f"{done.report.verdict.sentence}.")
    echo(f"{done.path}: adapter of rank {done.rank}, {done.kept:.1%} of the mixture's energy kept")


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with their cells below each other, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 0 < place < 3 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
