"""``merge moe``: a mixture of experts of dense models or adapters."""

from __future__ import annotations

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
from .output import echo, echo_json, echo_notices, echo_usage, format_size, plural, progress_bar

if TYPE_CHECKING:
    from merging.moe.plan import MoePlan

__all__ = ["moe_command"]


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
    progress: bool | None,
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
        with progress_bar(progress, "mixing") as report:
            made = make_planned_moe(
                plan, output, device=pick_device(device), threads=threads, overwrite=overwrite, progress=report
            )
    if as_json:
        echo_json(made.to_dict())
        return
    echo_notices(made.notices)
    echo(
        f"{made.path}: {made.architecture} of {plural(made.experts, 'expert')}, {plural(made.tensors, 'tensor')}, "
        f"{format_size(made.bytes)} in {made.seconds:.1f} s"
    )
    echo_usage(_usage(plan, made.path))


def _usage(plan: MoePlan, path: Path) -> str:
    """Return the call that loads the mixture; a program of its own, in the folder or on the Hub, must be trusted."""
    classes = plan.config.get("auto_map", {"": "AutoModelForCausalLM"})
    trust = ", trust_remote_code=True" if "auto_map" in plan.config else ""
    return f"transformers.{list(classes)[-1] or 'AutoModelForCausalLM'}.from_pretrained({str(path)!r}{trust})"


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
