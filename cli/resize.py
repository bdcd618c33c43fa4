"""``merge resize``: a LoRA with other ranks, in another format, or with its blocks scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execution_options
from .extract import adapter_options, run_recipe
from .options import (
    add_options,
    block_options,
    block_parameters,
    intruder_options,
    lora_alpha_option,
    read_intruder_options,
    recipe_only_option,
)
from .rank import rank_of, rank_options
from .types import MODEL

__all__ = ["resize_command"]


@click.command(name="resize", short_help="change the ranks, the format or the blocks of a LoRA")
@click.argument("lora", type=MODEL, metavar="LORA")
@click.option("--base", type=MODEL, help="its base  [default: none, or the stated base where intruders are reduced]")
@rank_options
@block_options
@click.option(
    "--scale",
    "scales",
    multiple=True,
    metavar="[NAME=]NUMBER",
    help="multiply the change, or its part in tensors of this name, part of names, or wildcards; may be repeated",
)
@add_options(*intruder_options)
@adapter_options
@lora_alpha_option
@recipe_only_option
@execution_options
def resize_command(lora: str, recipe_only: bool, execution: Execution, scales: tuple[str, ...], **stated: Any) -> None:
    """Write a LoRA with other ranks, in another format, or with some of its blocks scaled or left out.

    \b
    merge resize lora/ --rank 16 -o smaller/
    merge resize lora.safetensors --energy 0.95 -o smaller.safetensors
    merge resize lora/ --size 20MB --uniform -o smaller/
    merge resize lora.safetensors --blocks OUTALL --elements attn:0.5 -o other.safetensors
    merge resize lora/ --reduce-intruders -o milder/
    merge resize lora.safetensors --scale down_blocks=0.5 --exclude mid_block --format kohya -o other.safetensors

    The product of the factors is decomposed exactly, so that a rank keeps as much as any can. Without a condition
    nothing is lost.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        rank = rank_of(stated, {"energy": 1.0})
        values: dict[str, Any] = {"models": [lora], "method": "passthrough", "as": "adapter", "rank": rank}
        parameters = block_parameters(stated)
        if scales:
            parameters["scale"] = _read_scales(scales)
        values["parameters"] = parameters
        read_intruder_options(stated)
        notices: Sequence[str] = ()
        if stated.get("reduce_intruders") and stated["base"] is None:
            from merging.api.extract import find_stated_base

            found, notices = find_stated_base(lora)
            stated |= found
        run_recipe({**values, **stated}, "merge resize", execution, recipe_only, status, notices)


def _read_scales(words: tuple[str, ...]) -> dict[str, float] | float:
    """Return the numbers by names of tensors. Raises :class:`~merging.errors.OptionError`."""
    from merging.errors import OptionError

    scales: dict[str, float] = {}
    for word in words:
        name, sign, value = word.rpartition("=")
        try:
            scales[name if sign else "*"] = float(value)
        except ValueError:
            raise OptionError(f"--scale {word}: is no number: write --scale 0.5, or --scale down_blocks=0.5") from None
    return {**{name: scales[name] for name in scales if name != "*"}, "*": scales.get("*", 1.0)}
