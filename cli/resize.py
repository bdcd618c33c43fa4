"""``merge resize``: a LoRA with other ranks, in another format, or with its blocks scaled."""

from __future__ import annotations

from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execution_options
from .extract import adapter_options, run_recipe
from .options import base_option, block_options, block_parameters, lora_alpha_option, recipe_only_option
from .rank import rank_of, rank_options
from .types import MODEL

__all__ = ["resize_command"]


@click.command(name="resize", short_help="change the ranks, the format or the blocks of a LoRA")
@click.argument("lora", type=MODEL, metavar="LORA")
@base_option
@rank_options
@block_options
@click.option(
    "--scale",
    "scales",
    multiple=True,
    metavar="[NAME=]NUMBER",
    help="multiply the change, or its part in tensors of this name, part of names, or wildcards; may be repeated",
)
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
    merge resize lora.safetensors --scale down_blocks=0.5 --exclude mid_block --format kohya -o other.safetensors

    The product of the factors is decomposed exactly, so that a rank keeps as much as any can. Without a condition
    nothing is lost.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        rank = rank_of(stated, chosen=True)
        if not rank or not rank.keys() - {"uniform", "exact"}:
            rank = {**(rank or {}), "energy": 1.0}
        values: dict[str, Any] = {"models": [lora], "method": "passthrough", "as": "adapter", "rank": rank}
        parameters = block_parameters(stated)
        if scales:
            parameters["scale"] = _read_scales(scales)
        values["parameters"] = parameters
        run_recipe({**values, **stated}, "merge resize", execution, recipe_only, status)


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
