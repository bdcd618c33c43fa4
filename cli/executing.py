"""Carrying out a recipe from the command line: where it runs, where its output goes, and what is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import Size, echo, echo_json, echo_merged, echo_plan, progress_bar

if TYPE_CHECKING:
    from merging.plan.recipe import Recipe

    from .errors import Placed

__all__ = ["EXECUTION", "execute", "execution_options"]

EXECUTION = (
    "output",
    "overwrite",
    "device",
    "threads",
    "max_memory",
    "stream",
    "push",
    "private",
    "dry_run",
    "as_json",
    "progress",
    "debug",
)
"""The names of the options below."""


def execution_options(command: Any) -> Any:
    """The options that say where a merge runs and where it goes, none of which changes a byte of a tensor."""
    for option in reversed(
        [
            click.option("-o", "--output", type=click.Path(), help="a folder, or a single file ending in .safetensors"),
            click.option("--overwrite", is_flag=True, help="replace an existing output"),
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto"),
            click.option("--threads", type=int, help="workers  [default: all cores]"),
            click.option("--max-memory", type=Size(), help="most memory above the imports, such as 500MB"),
            click.option("--stream", is_flag=True, help="models of the Hub pass through the disk file by file"),
            click.option("--push", metavar="ORG/NAME", help="publish the output on the Hub too, as one commit"),
            click.option("--private", is_flag=True, help="with --push: only you may see it, if it is new"),
            click.option("--dry-run", is_flag=True, help="show the plan: nothing is merged or written"),
            click.option("--json", "as_json", is_flag=True, help="print the outcome as JSON"),
            click.option("--progress/--quiet", default=None, help="progress bar on stderr  [default: on a terminal]"),
            click.option("--debug", is_flag=True, help="show a traceback with errors"),
        ]
    ):
        command = option(command)
    return command


def execute(
    recipe: Recipe,
    standing: Placed,
    output: str | None,
    overwrite: bool,
    device: str,
    threads: int | None,
    max_memory: int | None,
    stream: bool,
    push: str | None,
    private: bool,
    dry_run: bool,
    as_json: bool,
    progress: bool | None,
    debug: bool,
) -> None:
    """Carry out a recipe as the options say, and tell what came out; ``standing`` learns where that goes."""
    from merging.api.merge_files import check_output, default_destination, merge_plan, plan_for
    from merging.engine.resources import pick_device
    from merging.errors import OptionError
    from merging.hub.push import push as publish
    from merging.hub.push import target_of

    destination = Path(output) if output is not None else default_destination(recipe)
    standing.expect(destination)
    if push and destination.suffix == ".safetensors":
        raise OptionError("--push publishes a folder, with its config and card: name a folder with -o")
    if private and not push:
        raise OptionError("--private is a setting of --push: name the repository")
    plan = plan_for(recipe, destination)
    target = target_of(push, private=private, overwrite=overwrite) if push else None
    if dry_run:
        check_output(plan, destination, overwrite, dry=True)
        echo_plan(plan, destination, threads, max_memory, as_json)
        return
    with progress_bar(progress) as report:
        merged = merge_plan(
            plan,
            destination,
            device=pick_device(device),
            threads=threads,
            max_memory=max_memory,
            overwrite=overwrite,
            stream=stream,
            progress=report,
        )
    outcome = merged.to_dict()
    if not as_json:
        echo_merged(merged, plan)
    if target is not None:
        standing.publishing = target.repo
        message = f"{len(plan.models)} models merged by {merged.method}"
        outcome["published"] = publish(destination, target, message)
    if as_json:
        echo_json(outcome)
    elif target is not None:
        echo(f"published as {outcome['published']}")
