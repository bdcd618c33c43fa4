"""``merge plan``: predict time, memory and cost from headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import Refusal, handle_errors
from .execution import Execution, show_plan
from .merge import MergeCommand, adapter_options, method_options, model_options, recipe_of
from .options import (
    base_option,
    block_options,
    debug_option,
    json_option,
    lenient_option,
    max_memory_option,
    threads_option,
)
from .output import echo, echo_json, echo_notices, format_size, plural
from .recipe_source import load_source
from .run_several import load_runs
from .types import METHOD, MODEL

if TYPE_CHECKING:
    from merging.plan.prediction.cluster import Cluster
    from merging.plan.prediction.rates import Rates
    from merging.plan.recipe import Recipe

__all__ = ["plan_command"]


class PlanCommand(MergeCommand):
    """The command that predicts a merge, which is typed as the merge itself, or in a recipe."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the three ways to call it."""
        formatter.write_usage(ctx.command_path, "[OPTIONS] RECIPE...")
        formatter.write_usage(ctx.command_path, "[OPTIONS] --method METHOD MODEL...", prefix="       ")
        formatter.write_usage(ctx.command_path, "--calibrate", prefix="       ")


@click.command(
    cls=PlanCommand, fields=method_options, name="plan", short_help="predict time, memory and cost from headers"
)
@click.argument("models", nargs=-1, type=MODEL, metavar="[RECIPE...|MODEL...]")
@click.option("-m", "--method", type=METHOD, help="a method or chain; its options join these")
@click.option(
    "--cluster",
    metavar="KEY=VALUE,...",
    help="machines, as nodes=8,cores=16,gpus=1,memory=64GB,disk=2GB/s,net=25Gb/s,storage=20GB/s,price=2.5  [default: "
    "this machine]",
)
@click.option("--calibrate", is_flag=True, help="measure the rates of this machine first, in a minute at most")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="change a value of the recipe")
@lenient_option
@base_option
@block_options
@adapter_options
@model_options
@click.option("-o", "--output", type=click.Path(), help="the file or folder that the merge would write")
@threads_option
@max_memory_option
@json_option
@debug_option
def plan_command(
    models: tuple[str, ...],
    method: str | None,
    cluster: str | None,
    calibrate: bool,
    settings: tuple[str, ...],
    lenient: bool,
    output: str | None,
    threads: int | None,
    max_memory: int | None,
    as_json: bool,
    debug: bool,
    fields: dict[str, Any],
    **stated: Any,
) -> None:
    """Predict a merge: bytes, sweeps, memory, operations, time and cost. Headers are read, and nothing is written.

    \b
    merge plan recipe.yml
    merge plan --method ties --base base/ one/ two/
    merge plan recipe.yml --cluster nodes=8,gpus=1,disk=2GB/s,net=25Gb/s,price=2.5
    merge plan --calibrate

    Times are by rates that --calibrate measures on this machine and on the disk of the working folder, and keeps in the
    cache folder; else by default rates. The price is for a node and an hour.
    """
    with handle_errors(debug):
        from merging.api.calibrate import load_rates
        from merging.plan.prediction.cluster import parse_cluster
        from merging.plan.recipe_settings import parse_setting

        machines = None if cluster is None else parse_cluster(cluster)
        if calibrate:
            _calibrate(as_json=as_json and not models)
            if not models:
                return
        execution = _execution(output, threads, max_memory, as_json)
        if method is not None or not is_recipe(models):
            if not models:
                raise Refusal(
                    "there is nothing to plan: name a recipe (merge plan recipe.yml), or type a merge (merge plan "
                    "--method linear one/ two/)",
                    "option",
                )
            _refuse_options({"set": settings, "lenient": lenient}, "is for recipes in a file: leave it out")
            _predict(recipe_of(models, method, fields, stated), execution, machines, load_rates())
            return
        _refuse_options({**stated, **fields}, "is in the recipe: change it there, or by --set")
        changes = [parse_setting(text) for text in settings]
        if len(models) > 1:
            runs = load_runs([Path(name) for name in models], changes, output, lenient=lenient)
            for run in runs:
                run.refuse_later()
            for run in runs:
                with run.loaded.name_lines():
                    placed = replace(execution, output=str(run.destination))
                    _predict(run.loaded.recipe, placed, machines, load_rates(), settings)
            return
        loaded = load_source(Path(models[0]), changes, lenient)
        echo_notices(loaded.notices)
        loaded.check_counts()
        loaded.check_paths()
        with loaded.name_lines():
            _predict(loaded.recipe, execution, machines, load_rates(), settings)


def is_recipe(models: Sequence[str]) -> bool:
    """Return whether the words after the command are recipes, and no models."""
    return bool(models) and all(name == "-" or name.endswith((".yml", ".yaml", ".json")) for name in models)


def _refuse_options(stated: Mapping[str, Any], remedy: str) -> None:
    for name, value in stated.items():
        if value not in (None, ()) and value is not False:
            raise Refusal(f"--{name.replace('__', '.').replace('_', '-')} {remedy}", "option")


def _execution(output: str | None, threads: int | None, max_memory: int | None, as_json: bool) -> Execution:
    """Return the execution of a dry run."""
    return Execution(
        output=output,
        overwrite=False,
        device="cpu",
        threads=threads,
        max_memory=max_memory,
        stream=False,
        keep_stages=None,
        resume=None,
        report=None,
        push=None,
        private=False,
        dry_run=True,
        as_json=as_json,
        progress=None,
        debug=False,
    )


def _predict(
    recipe: Recipe, execution: Execution, cluster: Cluster | None, rates: Rates, settings: Sequence[str] = ()
) -> None:
    """Print the plan of a recipe, and its prediction."""
    from merging.api.merge_files import default_destination, plan_for
    from merging.api.predict import predict_plan
    from merging.engine.resources import workers_within
    from merging.engine.threads import cores
    from merging.object_stores.store_path import output_path

    destination = output_path(execution.output) if execution.output is not None else default_destination(recipe)
    plan = plan_for(recipe, destination)
    workers = workers_within(plan, execution.threads or cores(), execution.max_memory)
    show_plan(plan, destination, execution, settings, predict_plan(plan, cluster, rates, workers))


def _calibrate(*, as_json: bool) -> None:
    """Measure the rates of this machine and keep them."""
    from dataclasses import asdict

    from merging.api.calibrate import calibrate, save_rates

    if not as_json:
        echo("measuring this machine, for a minute at most", err=True)
    rates = calibrate()
    path = save_rates(rates)
    if as_json:
        echo_json({"path": str(path), **asdict(rates)})
        return
    disk = f"reads {format_size(rates.read)}/s, writes {format_size(rates.write)}/s"
    echo(f"{rates.machine}: {plural(rates.cores, 'core')}, its disk {disk}; {plural(len(rates.methods), 'method')}")
    echo(f"kept in {path}")
