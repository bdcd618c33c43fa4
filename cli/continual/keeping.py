"""The commands that publish what a store holds, and that keep it in order."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ..errors import Placed, reported
from ..output import echo, echo_json, echo_notices, progress_bar, size_text
from .options import Standing, as_json_option, debug_option, store_argument, wait_option, working

__all__ = ["export_command", "gc_command", "relocate_command", "rollback_command", "verify_command"]


@click.command(name="export")
@store_argument
@click.option("-o", "--output", required=True, type=click.Path(), help="a folder, or a file ending in .safetensors")
@click.option("--as", "kind", type=click.Choice(["model", "adapter"]), default="model", show_default=True)
@click.option("--rank", type=int, help="rank of the adapter  [default: that of what is held as factors]")
@click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]), help="type of every tensor")
@click.option("--overwrite", is_flag=True, help="replace an existing output")
@working
@click.option("--progress/--quiet", default=None, help="progress bar on stderr  [default: on a terminal]")
@as_json_option
@debug_option
def export_command(store: str, output: str, progress: bool | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Write the merge of all models so far, as a full model or as an adapter."""
    with reported(debug, Placed(output)):
        from merging.continual import ContinualStore

        with progress_bar(progress) as report:
            merged = ContinualStore(store).export(output, progress=report, **options)
    if as_json:
        echo_json(merged.to_dict())
        return
    rank = f" of rank {merged.rank}" if merged.rank and merged.kind == "adapter" else ""
    echo(f"{output}: {merged.kind}{rank}, {merged.tensors} tensors, {size_text(merged.bytes)}")
    echo_notices(merged.notices)


@click.command(name="rollback")
@store_argument
@click.option("--to", type=int, required=True, help="the step to go back to; 0 is the empty store")
@wait_option
@as_json_option
@debug_option
def rollback_command(store: str, to: int, wait: float | None, as_json: bool, debug: bool) -> None:
    """Go back to the state after a step; later ones are forgotten.

    A watch that is started again adds their models once more, unless these have left the folder that it looks at.
    """
    with reported(debug, Standing(store)):
        from merging.continual import ContinualStore

        steps = len(ContinualStore(store).rollback(to, wait=wait).steps)
    if as_json:
        echo_json({"steps": steps}, indent=None)
    else:
        echo(f"{store}: {steps} models")


@click.command(name="relocate")
@store_argument
@click.option("--base", required=True, help="where the base is now")
@wait_option
@as_json_option
@debug_option
def relocate_command(store: str, base: str, wait: float | None, as_json: bool, debug: bool) -> None:
    """Note that the base was moved; every byte of its files must be what it was. A store itself may move freely."""
    with reported(debug, Standing(store)):
        from merging.continual import ContinualStore

        path = ContinualStore(store).relocate(base, wait=wait).base.path
    if as_json:
        echo_json({"base": path}, indent=None)
    else:
        echo(f"{store}: the base is {path}")


@click.command(name="verify")
@store_argument
@as_json_option
@debug_option
def verify_command(store: str, as_json: bool, debug: bool) -> None:
    """Hash all states and the base, and hold them against the manifest; exit code 1 if something is wrong."""
    with reported(debug):
        from merging.continual import ContinualStore

        verdict = ContinualStore(store).verify()
    if as_json:
        echo_json(asdict(verdict))
    elif not verdict.problems:
        gone = f", states of {len(verdict.removed)} removed" if verdict.removed else ""
        echo(f"{store}: {verdict.steps} models{gone}, all as it was written")
    for problem in verdict.problems if not as_json else ():
        echo(problem, err=True)
    if verdict.whole < verdict.steps and not as_json:
        back = f"merge continual rollback {store} --to {verdict.whole}"
        echo(f"step {verdict.whole} is the last whole state: go back to it with {back}", err=True)
    if verdict.problems:
        raise click.exceptions.Exit(1)


@click.command(name="gc")
@store_argument
@click.option("--keep", type=int, required=True, help="how many of the last states stay, to roll back to")
@wait_option
@as_json_option
@debug_option
def gc_command(store: str, keep: int, wait: float | None, as_json: bool, debug: bool) -> None:
    """Remove all states but the last ones, if the last one is whole."""
    with reported(debug, Standing(store)):
        from merging.continual import ContinualStore

        gone = ContinualStore(store).gc(keep, wait=wait)
    if as_json:
        echo_json({"removed": gone}, indent=None)
    else:
        echo(f"{store}: {len(gone)} states removed")
