"""The default command: merge models or adapters into one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import OutputStatus, Refusal, handle_errors
from .execution import Execution, execute, execution_options
from .fields import FieldsCommand, chain_options
from .options import (
    add_options,
    base_option,
    block_options,
    block_parameters,
    dequantize_option,
    different_bases_option,
    dtype_option,
    experts_option,
    lora_alpha_option,
    mismatch_option,
    quantize_option,
    recipe_only_option,
    shard_size_option,
    vocabulary_option,
)
from .output import echo_text
from .rank import energy_option, rank_of, size_option
from .types import METHOD, MODEL, NAME_OR_MAPPING

if TYPE_CHECKING:
    from merging.plan.recipe import Recipe

__all__ = [
    "MergeCommand",
    "adapter_options",
    "is_method",
    "merge_command",
    "method_options",
    "model_options",
    "recipe_of",
]


def method_options(typed: Mapping[str, Any]) -> list[click.Option]:
    """Return the options of the chosen method's chain."""
    return chain_options(typed["method"]) if typed.get("method") else []


class MergeCommand(FieldsCommand):
    """The command that merges, with the options of the chosen method; its own name may be left out."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage as people type it, without the command's name."""
        formatter.write_usage(ctx.find_root().command_path, "--method METHOD [OPTIONS] MODEL...")

    def explain(self, option: str, typed: Mapping[str, Any]) -> None:
        """Refuse an option of a method outside the chain, as a merge would, and a negative number of a list."""
        from merging.errors import OptionError
        from merging.methods import METHODS, links, method_class, owner_of, parameters_of

        if option[1:2].isdigit():
            raise OptionError(
                f"{option}: is no option: several values are joined by commas, without spaces, as in --weights 1,1,-1"
            )
        method = typed.get("method")
        field = option.lstrip("-").removeprefix("no-").replace("-", "_").rpartition(".")[2]
        if method and any(field in parameters_of(method_class(name)) for name in METHODS):
            owner_of(field, links(method), method)


adapter_options = add_options(
    click.option(
        "--as",
        type=click.Choice(["adapter", "model"]),
        help="kind of the output  [default: adapters make an adapter]",
    ),
    click.option(
        "--format",
        type=click.Choice(["peft", "diffusers", "kohya", "gguf"]),
        help="format of a merged adapter  [default: the format of the inputs if alike, else peft or diffusers]",
    ),
    click.option("--rank", type=int, help="rank of a merged adapter  [default: the sum of the ranks]"),
    energy_option,
    size_option,
    experts_option,
)
"""The options of merged adapters."""

model_options = add_options(
    dtype_option,
    click.option("--layers", type=int, help="number of blocks, instead of the number in the base or the adapters"),
    lora_alpha_option,
    shard_size_option,
    mismatch_option,
    vocabulary_option,
    click.option(
        "--tokenizer",
        type=NAME_OR_MAPPING,
        metavar="union|base|MODEL",
        help="match rows by token: all tokens, or the tokens of the base or a model; or a mapping in braces",
    ),
    click.option(
        "--chat-template",
        metavar="NAME|FILE",
        help="chat template of the output: auto for the commonest, chatml, llama3, mistral, alpaca, exaone, or a file",
    ),
    click.option(
        "--component",
        "components",
        multiple=True,
        help="merge this part of a pipeline, such as unet; the others are kept",
    ),
    click.option("--out-proj-once", is_flag=True, help="count LoRA on MultiheadAttention's output once"),
    dequantize_option,
    quantize_option,
    click.option(
        "--stats",
        multiple=True,
        type=click.Path(),
        help="statistics of a model on examples, from merge stats, for methods that need them; repeated, one a model",
    ),
    click.option(
        "--exclude",
        multiple=True,
        help="leave tensors as in the base, or the first model: a name, a part of names, or wildcards; may be repeated",
    ),
    different_bases_option,
    click.option("--allow-nonfinite", is_flag=True, help="merge inputs that hold NaN or infinities"),
    click.option(
        "--allow-unmatched",
        is_flag=True,
        help="name patterns in parameters that match no tensor, instead of refusing them",
    ),
)
"""The options of all outputs that a recipe states too."""


def _refuse_numbers(models: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Refuse models that are numbers, as in ``--weights 0.5 0.5``, and say how several values are written."""
    from merging.errors import OptionError

    numbers = [
        model for model in models if re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?,?", model) and not Path(model).exists()
    ]
    if numbers:
        name, first = next(((name, each) for name, each in fields.items() if isinstance(each, float)), ("weights", 1.0))
        values = ",".join([f"{first:g}", *(number.strip(",") for number in numbers)])
        raise OptionError(
            f"{numbers[0]}: is a number, and no model has this name: several values are joined by commas, without "
            f"spaces: --{name.replace('__', '.').replace('_', '-')} {values}"
        )


def is_method(word: str) -> bool:
    """Return whether a word is a method or chain, and no file or folder."""
    from merging.methods import METHODS

    return set(word.split("+")) <= METHODS.keys() and not Path(word).exists()


def _refuse_method(models: Sequence[str]) -> None:
    """Refuse a method in place of the first model, and say how a method is written."""
    if models and is_method(models[0]):
        raise Refusal(f"{models[0]} is a method: write --method {models[0]}", "option")


def recipe_of(
    models: Sequence[str], method: str | None, fields: Mapping[str, Any], stated: Mapping[str, Any]
) -> Recipe:
    """Return the recipe of a typed merge: its models and method, the options of the method, and all others.

    Raises :class:`~merging.errors.OptionError` and :class:`~merging.cli.errors.Refusal`.
    """
    from merging.errors import OptionError
    from merging.methods import METHODS
    from merging.plan.recipe_values import make_recipe

    if method is None:
        _refuse_method(models)
        listed = "\n".join(f"  {name:16} {entry.summary}" for name, entry in METHODS.items())
        raise Refusal(
            f"which method? See merge methods --help-me-choose, or choose one with --method:\n{listed}", "option"
        )
    _refuse_numbers(models, fields)
    if not models:
        raise OptionError("there is nothing to merge: name at least one model")
    stated = dict(stated)
    parameters = {name.replace("__", "."): value for name, value in fields.items()} | block_parameters(stated)
    stated["rank"] = rank_of(stated)
    values = {name: value for name, value in stated.items() if value not in (None, ()) and value is not False}
    return make_recipe({"models": list(models), "method": method, "parameters": parameters, **values}, "merge")


@click.command(
    cls=MergeCommand,
    fields=method_options,
    name="merge",
    short_help="merge models; the default, so its name may be left out",
)
@click.argument("models", nargs=-1, type=MODEL, metavar="MODEL...")
@click.option(
    "-m",
    "--method",
    type=METHOD,
    help="a method or chain, such as linear or lines+task_arithmetic; its options join these",
)
@base_option
@block_options
@adapter_options
@model_options
@recipe_only_option
@execution_options
def merge_command(
    models: tuple[str, ...],
    method: str | None,
    recipe_only: bool,
    execution: Execution,
    fields: dict[str, Any],
    **stated: Any,
) -> None:
    """Merge fine-tuned models or LoRA adapters into one.

    \b
    merge --method linear a.safetensors b.safetensors
    merge --method lines --base BASE one/ two/ -o merged/
    merge --method task_arithmetic --weights 1,1,-1 a/ b/ c/ --base BASE -o out/

    A MODEL is a folder, a weights file, a model on the Hub (ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME/FILE, or the
    address of its page) or in a store (s3://BUCKET/FOLDER): a full checkpoint or an adapter. A folder that is named
    like a command is given as ./inspect.
    The options of a method are shown by merge --method METHOD --help.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        recipe = recipe_of(models, method, fields, stated)
        if recipe_only:
            recipe.method.check(len(recipe.models))
            echo_text(recipe.to_yaml().removesuffix("\n"))
        else:
            execute(recipe, execution, status)
