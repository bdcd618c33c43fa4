"""LoRA of experts with names for each expert: read by llama.cpp, SGLang and vLLM, and stacked again by PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable

from merging.errors import InputError, OptionError, option
from merging.maths.site import Site
from merging.plan.items import Placing
from merging.plan.names.peft_names import PREFIX, module_of
from merging.plan.names.resolve import Resolver
from merging.sources.changes import Change
from merging.storage.output_tensor import OutputTensor

__all__ = ["check_experts_apart", "place_experts"]

_EXPERT = re.compile(r"experts\.[0-9]+\.")


def check_experts_apart(targets: Iterable[str], experts: bool) -> None:
    """Refuse to take experts apart where no adapter changes any.

    Raises :class:`~merging.errors.OptionError`.
    """
    if not experts and not any(map(_EXPERT.search, targets)):
        raise OptionError(f"{option('experts')} is for LoRA on experts, and the adapters change none: leave it out")


def place_experts(
    site: Site, change: Change, *, rank: int, dtype_name: str, resolver: Resolver | None
) -> tuple[Placing, ...]:
    """Return the places of the factors of experts that are one tensor in memory: two tensors for each projection.

    Projections that are fused in memory have one lower factor, and each its rows of the upper one. Every projection
    gets a copy of the lower factor, so the change is the same to the bit. Raises :class:`~merging.errors.InputError`
    where the base does not show the names of single experts.
    """
    if resolver is None:
        raise InputError(
            f"{site.name}: only the base's files have names for single experts: give it with {option('base')}, or "
            f"leave {option('experts', 'apart')} out"
        )
    outer, inner = (2, 1) if change.is_transposed(site.shape) else (1, 2)
    placings = []
    for stored, piece in resolver.holders(site.name):
        expert, rows, columns = piece.box[0], piece.box[outer], piece.box[inner]
        if len(piece.axes) != 2 or not stored.endswith(".weight") or columns != slice(0, site.shape[inner]):
            raise InputError(
                f"{site.name}: the base keeps its experts together ({stored}), so that single ones have no names: "
                f"leave {option('experts', 'apart')} out"
            )
        path = PREFIX + module_of(stored)
        placing = Placing(
            OutputTensor(f"{path}.lora_A.weight", dtype_name, (rank, site.shape[inner])),
            OutputTensor(f"{path}.lora_B.weight", dtype_name, (rows.stop - rows.start, rank)),
            rows,
            first=0,
            term=0,
            expert=expert.start,
        )
        placings.append(placing)
    return tuple(placings)
