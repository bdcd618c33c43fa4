"""The execution of a recipe: the options that say where it runs and where its output goes, and the run itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    add_options,
    debug_option,
    device_option,
    engine_options,
    json_option,
    max_memory_option,
    overwrite_option,
    private_option,
    progress_option,
    threads_option,
)
from .output import echo, echo_json, echo_merged, echo_plan, echo_usage, plural, show_progress

if TYPE_CHECKING:
    from merging.api.predict import Prediction
    from merging.api.rerun import PlannedRerun
    from merging.cluster import RayCluster
    from merging.plan import Plan
    from merging.plan.recipe import Recipe

    from .errors import OutputStatus

__all__ = ["Execution", "execute", "execution_options", "show_plan"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how a recipe is carried out; nothing of it changes a byte of a tensor."""

    output: str | None
    overwrite: bool
    device: str
    threads: int | None
    max_memory: int | None
    stream: bool
    keep_stages: str | None
    resume: bool | None
    report: str | None
    push: str | None
    private: bool
    dry_run: bool
    as_json: bool
    progress: str | None
    debug: bool
    engine: str = "local"
    address: str | None = None
    workers: int | None = None
    worker_cpus: float | None = None
    worker_gpus: float | None = None

    def make_cluster(self) -> RayCluster | None:
        """Return the cluster that the options describe, if any."""
        from merging.cluster import make_cluster

        return make_cluster(
            self.engine,
            self.address,
            workers=self.workers,
            worker_cpus=self.worker_cpus,
            worker_gpus=self.worker_gpus,
        )


_options = add_options(
    click.option(
        "-o",
        "--output",
        type=click.Path(),
        help="a folder, a single file ending in .safetensors, or an address such as s3://bucket/merged  [default: "
        "merged, or merged.safetensors if all models are files]",
    ),
    overwrite_option,
    device_option,
    threads_option,
    max_memory_option,
    *engine_options,
    click.option("--stream", is_flag=True, help="models of the Hub and of stores pass through the disk file by file"),
    click.option(
        "--keep-stages", type=click.Path(), metavar="DIR", help="a folder for the outputs of recipes among the models"
    ),
    click.option(
        "--resume/--no-resume",
        default=None,
        help="go on with a merge that stopped, or remove its finished work  [default: go on; outputs above 10 GB can]",
    ),
    click.option(
        "--report",
        type=click.Path(),
        metavar="FILE",
        help="write a page (.html) about the merge: what changed, each model's part in it, and time; --json prints its "
        "numbers",
    ),
    click.option("--push", metavar="ORG/NAME", help="publish the output on the Hub too, as one commit"),
    private_option,
    click.option("--dry-run", is_flag=True, help="show the plan: nothing is merged or written"),
    json_option,
    progress_option,
    debug_option,
)


def execution_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :class:`Execution`, and its function one as ``execution``."""

    @wraps(function)
    def collect(**values: Any) -> None:
        execution = Execution(**{field.name: values.pop(field.name) for field in fields(Execution)})
        function(execution=execution, **values)

    return _options(collect)


def show_plan(
    plan: Plan,
    destination: Path,
    execution: Execution,
    settings: Sequence[str] = (),
    prediction: Prediction | None = None,
) -> None:
    """Print a plan, with the remark on a destination that exists, and perhaps a prediction."""
    from merging.api.merge_files import check_output

    remark = check_output(plan, destination, execution.overwrite, dry=True)
    shown = replace(plan, notices=(*plan.notices, *filter(None, [remark])))
    echo_plan(shown, destination, execution, settings, prediction)


def execute(
    recipe: Recipe,
    execution: Execution,
    status: OutputStatus,
    settings: Sequence[str] = (),
    planned: PlannedRerun | None = None,
    notices: Sequence[str] = (),
    facts: Mapping[str, float] | None = None,
) -> None:
    """Carry out a recipe and print the outcome; ``status`` learns where the output goes.

    ``settings`` are changes of the recipe as typed, which a dry run shows. ``planned`` is the plan of a merge that is
    made once more. ``notices`` and ``facts`` are of the choice of the recipe.
    """
    from merging.api.merge_files import default_destination, merge_plan, plan_for
    from merging.api.usage import describe_usage
    from merging.engine.cluster_crew import pick_cluster_devices
    from merging.engine.resources import pick_devices
    from merging.errors import OptionError
    from merging.hub.push import push, target_of
    from merging.object_stores.store_path import StorePath, output_path

    destination = output_path(execution.output) if execution.output is not None else default_destination(recipe)
    status.expect(destination)
    if execution.push and destination.suffix == ".safetensors":
        raise OptionError("--push publishes a folder, with its config and card: name a folder with -o")
    if execution.push and isinstance(destination, StorePath):
        raise OptionError("--push publishes a folder on the local disk: name one with -o")
    if execution.private and not execution.push:
        raise OptionError("--private is a setting of --push: name the repository")
    plan = planned.plan if planned else plan_for(recipe, destination)
    target = None
    if execution.push:
        target = target_of(execution.push, private=execution.private, overwrite=execution.overwrite)
    plan = replace(plan, notices=(*notices, *plan.notices))
    if execution.dry_run:
        show_plan(plan, destination, execution, settings)
        return
    cluster = execution.make_cluster()
    with show_progress(execution.progress) as report:
        merged = merge_plan(
            plan,
            destination,
            devices=pick_devices(execution.device, plan) if cluster is None else pick_cluster_devices(execution.device),
            threads=execution.threads,
            max_memory=execution.max_memory,
            overwrite=execution.overwrite,
            stream=execution.stream,
            progress=report,
            keep_stages=Path(execution.keep_stages) if execution.keep_stages else None,
            resume=execution.resume,
            report=None if execution.report is None else output_path(execution.report),
            shown=planned.shown if planned else None,
            cluster=cluster,
        )
    merged = replace(merged, facts={**merged.facts, **(facts or {})})
    if planned:
        merged = replace(merged, notices=(*merged.notices, *filter(None, [planned.compare(destination)])))
    usage = describe_usage(destination)
    outcome = {**merged.to_dict(), "usage": usage or None}
    if not execution.as_json:
        echo_merged(merged, plan)
        echo_usage(usage)
    if target is not None:
        status.publishing = target.repo
        outcome["published"] = push(
            destination, target, f"{plural(len(plan.models), 'model')} merged by {merged.method}"
        )
    if execution.as_json:
        echo_json(outcome)
    elif target is not None:
        echo(f"published as {outcome['published']}")
