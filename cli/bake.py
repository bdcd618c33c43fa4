"""``merge bake``: adapters added to their base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execute, execution_options
from .fields import FieldsCommand, chain_options
from .merge import model_options
from .options import (
    add_options,
    block_options,
    block_parameters,
    intruder_options,
    read_intruder_options,
    recipe_only_option,
)
from .output import echo_text
from .types import METHOD, MODEL, NAME_OR_MAPPING

__all__ = ["bake_command"]


def bake_fields(typed: Mapping[str, Any]) -> list[click.Option]:
    """Return the options of the chosen method's chain, or of the sum."""
    return chain_options(typed.get("method") or "task_arithmetic")


@click.command(cls=FieldsCommand, fields=bake_fields, name="bake", short_help="write adapters into their base")
@click.argument("adapters", nargs=-1, required=True, type=MODEL, metavar="ADAPTER...")
@click.option("--base", type=MODEL, help="another base than the adapters state")
@click.option(
    "-m", "--method", type=METHOD, help="a method or chain for several adapters  [default: the sum of their changes]"
)
@click.option(
    "--as-trained",
    type=NAME_OR_MAPPING,
    metavar="nf4|fp4|int8",
    help="add to the base as bitsandbytes quantised it for the training (QLoRA); or a mapping in braces",
)
@block_options
@add_options(*intruder_options)
@model_options
@recipe_only_option
@execution_options
def bake_command(
    adapters: tuple[str, ...],
    base: str | None,
    method: str | None,
    recipe_only: bool,
    execution: Execution,
    fields: dict[str, Any],
    **stated: Any,
) -> None:
    """Add ADAPTERs to their base, and write the full model.

    \b
    merge bake lora/ -o baked/
    merge bake ORG/LORA -o baked/
    merge bake style/ character/ --weights 1,0.6 --base BASE -o baked/

    The base is found from the adapters: a path, the cache of the Hub, or the Hub. If they were trained on a quantised
    copy of a model (-bnb-4bit, -GPTQ, -AWQ, -FP8), its 16-bit twin is looked for, named and used. Embeddings, heads and
    other modules saved in full go along, and the tokenizer, chat template and generation config next to the first
    adapter that has a tokenizer; the vocabulary grows to its tokens. A notice names files that stay behind.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        from merging.api.bake import bake_recipe

        read_intruder_options(stated)
        parameters = {name.replace("__", "."): value for name, value in fields.items()} | block_parameters(stated)
        options = {name: value for name, value in stated.items() if value not in (None, ()) and value is not False}
        baking = bake_recipe(list(adapters), method, {**options, **parameters, "base": base})
        if recipe_only:
            baking.recipe.method.check(len(baking.recipe.models))
            echo_text(baking.recipe.to_yaml().removesuffix("\n"))
        else:
            execute(baking.recipe, execution, status, notices=baking.notices)
