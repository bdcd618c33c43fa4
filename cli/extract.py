"""``merge extract``: a LoRA out of a full fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execute, execution_options
from .options import (
    add_options,
    dequantize_option,
    dtype_option,
    experts_option,
    mismatch_option,
    recipe_only_option,
    vocabulary_option,
)
from .output import echo_text
from .rank import rank_of, rank_options
from .types import MODEL

__all__ = ["adapter_options", "extract_command", "run_recipe"]

_DEFAULT_RANK = 64

adapter_options = add_options(
    click.option(
        "--format",
        type=click.Choice(["peft", "diffusers", "kohya", "gguf"]),
        help="format of the adapter  [default: peft, or diffusers for models of diffusion]",
    ),
    dtype_option,
    experts_option,
    click.option(
        "--exclude", multiple=True, help="leave tensors out: a name, a part of names, or wildcards; may be repeated"
    ),
    click.option("--allow-nonfinite", is_flag=True, help="take inputs that hold NaN or infinities"),
)
_part_options = add_options(
    click.option("--include", multiple=True, help="write these tensors only, named as for --exclude; may be repeated"),
    click.option(
        "--embeddings",
        type=click.Choice(["factors", "full", "base"]),
        help="token embeddings: as factors, in full, or left as in the base  [default: factors]",
    ),
    click.option("--heads", type=click.Choice(["factors", "full", "base"]), help="output heads  [default: factors]"),
    click.option(
        "--norms", type=click.Choice(["full", "base"]), help="norms  [default: full, where the format holds them]"
    ),
    click.option(
        "--biases", type=click.Choice(["full", "base"]), help="biases  [default: full, where the format holds them]"
    ),
    mismatch_option,
    vocabulary_option,
)


def run_recipe(
    values: dict[str, Any],
    command: str,
    execution: Execution,
    recipe_only: bool,
    status: OutputStatus,
    notices: Sequence[str] = (),
) -> None:
    """Carry out the recipe of these values, or print it; ``notices`` are remarks on what was found for it."""
    from merging.plan.recipe_values import make_recipe

    recipe = make_recipe(
        {name: value for name, value in values.items() if value not in (None, (), {}) and value is not False}, command
    )
    if recipe_only:
        echo_text(recipe.to_yaml().removesuffix("\n"))
    else:
        execute(recipe, execution, status, notices=tuple(notices))


@click.command(name="extract", short_help="write the change of a fine-tune as a LoRA")
@click.argument("model", type=MODEL, metavar="FINETUNE")
@click.option("--base", required=True, type=MODEL, help="the model that it was trained from")
@rank_options
@adapter_options
@_part_options
@dequantize_option
@recipe_only_option
@execution_options
def extract_command(model: str, base: str, recipe_only: bool, execution: Execution, **stated: Any) -> None:
    """Write the change of a full fine-tune from its base as a LoRA.

    \b
    merge extract tuned/ --base base/ --rank 64 -o lora/
    merge extract tuned/ --base base/ --energy 0.95 --rank 256 -o lora/
    merge extract tuned/ --base base/ --size 200MB -o lora/
    merge extract tuned.safetensors --base sdxl.safetensors --format kohya --sv-ratio 20 -o lora.safetensors

    Each tensor gets the rank that its own singular values need; tensors that did not change are left out. Without a
    condition the rank is 64.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        rank = rank_of(stated, {"most": _DEFAULT_RANK})
        names = ("include", "embeddings", "heads", "norms", "biases")
        parts = {name: value for name in names if (value := stated.pop(name)) not in (None, ())}
        values = {"models": [model], "base": base, "method": "passthrough", "as": "adapter", "rank": rank}
        run_recipe({**values, "parts": parts, **stated}, "merge extract", execution, recipe_only, status)
