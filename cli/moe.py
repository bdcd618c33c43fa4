"""``merge moe``: a mixture of experts of dense models or adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import OutputStatus, handle_errors
from .options import (
    debug_option,
    device_option,
    json_option,
    overwrite_option,
    progress_option,
    threads_option,
)
from .output import echo, echo_json, echo_notices, echo_usage, format_size, plural, show_progress

if TYPE_CHECKING:
    from merging.moe.make import MixtureOfExperts
    from merging.moe.plan import MoePlan
    from merging.moe.rerun import PlannedMoeRerun

    from .execution import Execution

__all__ = ["make_again", "moe_command"]


@click.command(name="moe", short_help="make a mixture of experts")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="the folder to write")
@click.option("--dry-run", is_flag=True, help="show the plan: nothing is made or written")
@click.option("--lenient", is_flag=True, help="ignore unknown keys, as mergekit does, and say so")
@device_option
@threads_option
@overwrite_option
@progress_option
@json_option
@debug_option
def moe_command(
    recipe: Path,
    output: Path,
    dry_run: bool,
    lenient: bool,
    device: str,
    threads: int | None,
    overwrite: bool,
    progress: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Make the mixture of experts of a RECIPE, in mergekit's schema for mixtures.

    \b
    merge moe mixture.yml -o mixture/
    merge moe mixture.yml -o mixture/ --dry-run

    The MLPs of the experts become the experts, all else is the base's. Routers are made of prompts (gate_mode: hidden,
    hidden_avg, hidden_last, cheap_embed), at random (random, uniform_random), or with low-rank experts of the changes'
    own singular vectors, which need no prompts (smile). The output is Mixtral, Qwen2-MoE, Qwen3-MoE or DeepSeek-MoE.
    Relative paths in a recipe are relative to its folder.
    """
    with handle_errors(debug, OutputStatus(output)):
        from merging.engine.resources import pick_device
        from merging.moe.make import check_moe_output, make_planned_moe, preview_moe

        plan = preview_moe(recipe, lenient=lenient)
        if dry_run:
            _echo_plan(plan, output, check_moe_output(plan, output, overwrite, dry=True), as_json)
            return
        with show_progress(progress, "mixing") as report:
            made = make_planned_moe(
                plan, output, device=pick_device(device), threads=threads, overwrite=overwrite, progress=report
            )
    _echo_made(made, as_json)


def make_again(planned: PlannedMoeRerun, execution: Execution, status: OutputStatus) -> None:
    """Make a mixture once more, with the options of ``merge rerun``, and print the outcome."""
    from merging.engine.resources import pick_device
    from merging.errors import OptionError
    from merging.moe.make import check_moe_output, make_planned_moe

    if execution.output is None:
        raise OptionError("a mixture is written into a folder: name it with -o")
    for option, given in (
        ("--stream", execution.stream),
        ("--push", execution.push),
        ("--max-memory", execution.max_memory),
        ("--report", execution.report),
    ):
        if given:
            raise OptionError(f"{option} is no option of mixtures: leave it out")
    output = Path(execution.output)
    status.expect(output)
    if execution.dry_run:
        remark = check_moe_output(planned.plan, output, execution.overwrite, dry=True)
        _echo_plan(planned.plan, output, remark, execution.as_json)
        return
    with show_progress(execution.progress, "mixing") as report:
        made = make_planned_moe(
            planned.plan,
            output,
            device=pick_device(execution.device),
            threads=execution.threads,
            overwrite=execution.overwrite,
            progress=report,
        )
    notices = (*made.notices, *filter(None, [planned.compare(output)]))
    _echo_made(replace(made, notices=notices), execution.as_json)


def _echo_made(made: MixtureOfExperts, as_json: bool) -> None:
    from merging.api.usage import describe_usage

    if as_json:
        echo_json(made.to_dict())
        return
    echo_notices(made.notices)
    echo(
        f"{made.path}: {made.architecture} of {plural(made.experts, 'expert')}, {plural(made.tensors, 'tensor')}, "
        f"{format_size(made.bytes)} in {made.seconds:.1f} s"
    )
    echo_usage(describe_usage(made.path))


def _echo_plan(plan: MoePlan, output: Path, remark: str, as_json: bool) -> None:
    notices = [*plan.notices, *filter(None, [remark])]
    facts = {
        "architecture": plan.architecture,
        "gate_mode": plan.recipe.gate_mode,
        "base": plan.base.name,
        "experts": [each.name for each in plan.experts],
        "output": str(output),
        "tensors": len(plan.outs),
        "write_bytes": plan.out_bytes,
        "tensor_memory_bytes": max(part.memory for part in plan.parts),
        "notices": notices,
    }
    if as_json:
        echo_json(facts)
        return
    experts = plural(len(plan.recipe.experts), "expert")
    echo(f"{plan.architecture}: {experts} into {output}, routers by {plan.recipe.gate_mode}")
    echo(f"  writes  {format_size(plan.out_bytes)} in {plural(len(plan.outs), 'tensor')}")
    echo(f"  memory  {format_size(max(part.memory for part in plan.parts))} at most for a tensor and each thread")
    echo_notices(notices)
