"""Options of the ranks of an adapter, which several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .options import add_options
from .types import SIZE

__all__ = ["energy_option", "rank_of", "rank_options", "size_option"]

energy_option = click.option(
    "--energy",
    type=float,
    help="choose the rank of each tensor: the smallest that keeps this share of the squared singular values, up to 1",
)
size_option = click.option(
    "--size", type=SIZE, help="choose the ranks by which a file of at most this size keeps the most energy, as in 200MB"
)

rank_options = add_options(
    click.option("--rank", type=int, help="rank of every tensor, or with the options below the largest rank"),
    energy_option,
    click.option("--error", type=float, help="largest relative error of the change of a tensor, in its Frobenius norm"),
    click.option("--sv-ratio", type=float, help="keep singular values down to the first one divided by this"),
    size_option,
    click.option("--uniform", is_flag=True, help="one rank for all tensors, which every server takes"),
    click.option("--exact", is_flag=True, help="decompose in full precision also where an approximation is quicker"),
)

_NAMES = ("rank", "energy", "error", "sv_ratio", "size", "uniform", "exact")


def rank_of(options: dict[str, Any], default: Mapping[str, Any] | None = None) -> Any:
    """Take the options of ranks out of a command's options, and return the field of the recipe that they mean.

    With ``default``, the conditions where none is stated, a rank alone is the largest rank, and tensors that need less
    get less. Raises :class:`~merging.errors.OptionError` for a value out of range.
    """
    from merging.plan.rank_settings import make_conditions

    conditions = make_conditions({name: options.pop(name, None) for name in _NAMES}, default or {})
    return conditions.get("most") if default is None and conditions.keys() <= {"most"} else conditions
