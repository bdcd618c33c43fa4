"""``merge soup``: average the checkpoints of a run."""

from __future__ import annotations

from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execute, execution_options
from .options import (
    add_options,
    base_option,
    dequantize_option,
    dtype_option,
    kind_option,
    recipe_only_option,
    shard_size_option,
)
from .output import echo, echo_text
from .types import MODEL

__all__ = ["soup_command"]

_SCHEDULES = ["mean", "ema", "linear", "cosine", "1-sqrt"]

_choices = add_options(
    click.option("--last", type=int, metavar="COUNT", help="average the last checkpoints only  [default: all]"),
    click.option("--until", type=int, metavar="STEP", help="leave out checkpoints after this step"),
    click.option(
        "--schedule",
        type=click.Choice(_SCHEDULES),
        default="mean",
        help="equal weights, a moving average, or the decay of the learning rate that the weights stand for  "
        "[default: mean]",
    ),
    click.option(
        "--ema-decay", type=float, help="share that each checkpoint keeps of the moving average [default: 0.8]"
    ),
    click.option(
        "--score",
        metavar="COMMAND",
        help="a command that prints a number for a model, whose path is put in place of {} or behind it: a greedy soup",
    ),
    click.option("--window", type=int, metavar="COUNT", help="score windows of consecutive checkpoints, use the best"),
    click.option("--minimize", is_flag=True, help="lower scores are better"),
    click.option(
        "--score-timeout", type=float, default=3600.0, help="most seconds for scoring a model  [default: 3600]"
    ),
    base_option,
    kind_option,
    click.option("--rank", type=int, help="rank of an averaged adapter  [default: the rank of the checkpoints]"),
    dtype_option,
    shard_size_option,
    dequantize_option,
)


@click.command(name="soup", short_help="average the checkpoints of a run")
@click.argument("checkpoints", nargs=-1, required=True, type=MODEL, metavar="RUN | CHECKPOINT...")
@_choices
@recipe_only_option
@execution_options
def soup_command(
    checkpoints: tuple[str, ...],
    last: int | None,
    until: int | None,
    schedule: Any,
    ema_decay: float | None,
    score: str | None,
    window: int | None,
    minimize: bool,
    score_timeout: float,
    recipe_only: bool,
    execution: Execution,
    **stated: Any,
) -> None:
    """Average the checkpoints of a RUN: full models, or adapters.

    \b
    merge soup run/ -o soup/
    merge soup run/ --last 5 --schedule 1-sqrt -o soup/
    merge soup run/ --score "python evaluate.py" -o soup/
    merge soup one/ two/ three/ --score "python evaluate.py" --minimize -o soup/

    Checkpoints are found in the folder of a run by their names, and sorted by step: checkpoint-500/, step-500/,
    epoch=1-step=500.ckpt, name-000004.safetensors, folders of torch.distributed.checkpoint. Several paths are
    checkpoints themselves. States of optimizers are never read.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        from merging.errors import OptionError
        from merging.object_stores.store_path import output_path
        from merging.soups.average import SoupSettings, plan_soup

        settings = SoupSettings(
            last=last,
            until=until,
            schedule=schedule,
            ema_decay=ema_decay,
            score=score,
            window=window,
            minimize=minimize,
            score_timeout=score_timeout,
        )
        if score is not None and execution.dry_run:
            raise OptionError("--dry-run merges nothing, and --score merges soups to score them: leave one out")
        options = {name: value for name, value in stated.items() if value is not None and value is not False}
        destination = output_path(execution.output or "merged")
        planned = plan_soup(
            checkpoints,
            destination,
            settings,
            options,
            on_event=lambda line: echo(f"scored {line}", err=True),
            cluster=execution.make_cluster(),
        )
        if recipe_only:
            echo_text(planned.recipe.to_yaml().removesuffix("\n"))
        else:
            execute(planned.recipe, execution, status, notices=planned.notices, facts=planned.facts)
