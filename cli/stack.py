"""``merge stack``: put blocks of models one above the other."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execute, execution_options
from .options import dequantize_option, dtype_option, recipe_only_option, shard_size_option
from .output import echo_text
from .types import MODEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["stack_command"]


@click.command(name="stack", short_help="stack layers of models: repeat, take out, or put together")
@click.argument("parts", nargs=-1, required=True, type=MODEL, metavar="MODEL RANGE... [MODEL RANGE...]...")
@click.option(
    "--scale",
    "scales",
    multiple=True,
    metavar="NAME=VALUE",
    help="multiply tensors of the blocks that are repeated, such as o_proj=0; may be repeated",
)
@dtype_option
@dequantize_option
@shard_size_option
@recipe_only_option
@execution_options
def stack_command(
    parts: tuple[str, ...], scales: tuple[str, ...], recipe_only: bool, execution: Execution, **stated: Any
) -> None:
    """Stack layers of models, in the order in which they are named.

    \b
    merge stack model/ 0:24 8:32 -o longer/
    merge stack a/ 0:24 b/ 8:32 -o a-and-b/
    merge stack model/ 0:24 8:32 --scale o_proj=0 --scale down_proj=0 -o longer/
    merge stack t5/ decoder=0:6 decoder=3:12 -o longer/

    A RANGE is the first block, counted from 0, and the block behind the last. Of a model with several stacks of blocks
    the name of one goes in front. Embeddings come from the first model, the final norm and the head from the last, and
    config.json states the new number of blocks. Tensors are copied as they are.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        from merging.plan.recipe_values import make_recipe

        options = {name: value for name, value in stated.items() if value not in (None, False)}
        recipe = make_recipe({"stack": _read_parts(parts, _read_scales(scales)), **options}, "merge stack")
        if recipe_only:
            echo_text(recipe.to_yaml().removesuffix("\n"))
        else:
            execute(recipe, execution, status)


def _read_parts(words: Sequence[str], scales: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts that words mean. Raises :class:`~merging.errors.OptionError`."""
    from merging.errors import OptionError
    from merging.plan.layer_stack import is_range

    parts: list[dict[str, Any]] = []
    model, used = None, True
    for word in words:
        if not is_range(word):
            if not used:
                raise OptionError(f"{model}: no range of blocks follows this model: write 0:8 behind it")
            model, used = word, False
        elif model is None:
            raise OptionError(f"{word}: a range of blocks follows the model that it is taken from: write MODEL {word}")
        else:
            parts.append({"model": model, "layers": word})
            used = True
    if not used:
        raise OptionError(f"{model}: no range of blocks follows this model: write 0:8 behind it")
    return _scale_repeats(parts, scales) if scales else parts


def _read_scales(words: Sequence[str]) -> dict[str, float]:
    """Return the numbers by name, 1 for all other tensors. Raises :class:`~merging.errors.OptionError`."""
    from merging.errors import OptionError

    scales: dict[str, float] = {}
    for word in words:
        name, sign, value = word.rpartition("=")
        try:
            scales[name] = float(value)
        except ValueError:
            sign = ""
        if not (name and sign):
            raise OptionError(f"--scale {word}: is no number by name: write --scale o_proj=0")
    return {**scales, "*": 1} if scales else {}


def _scale_repeats(parts: Sequence[dict[str, Any]], scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the parts, cut where blocks that stand in the stack already begin or end; these are multiplied."""
    from merging.errors import OptionError
    from merging.plan.layer_stack import LayerPart

    seen: set[tuple[str, str | None, int]] = set()
    cut: list[dict[str, Any]] = []
    repeated = False
    for part in parts:
        read = LayerPart.model_validate(part)
        start, stop = read.bounds or (0, 0)
        keys = [(part["model"], read.stack, index) for index in range(start, stop)]
        marked = [(key in seen, index) for key, index in zip(keys, range(start, stop), strict=True)]
        for again, run in groupby(marked, lambda each: each[0]):
            blocks = [index for _, index in run]
            named = f"{read.stack}=" if read.stack else ""
            piece = {"model": part["model"], "layers": f"{named}{blocks[0]}:{blocks[-1] + 1}"}
            cut.append(piece | {"scale": dict(scales)} if again else piece)
            repeated = repeated or again
        seen |= set(keys)
    if not repeated:
        raise OptionError("--scale multiplies blocks that are repeated, and none is: leave it out")
    return cut
