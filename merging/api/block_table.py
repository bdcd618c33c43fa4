"""The blocks of a model or adapter, with the elements of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from merging.maths.blocks import LISTS, NAMES, NamedBlock, describe_blocks, find_block
from merging.maths.elements import find_parts
from merging.maths.layers import Stacks

__all__ = ["describe_model_blocks"]


def describe_model_blocks(shapes: Mapping[str, tuple[int, ...]], stacks: Stacks) -> dict[str, Any]:
    """Return facts about the blocks of a model.

    Args:
        shapes: the shape of each tensor, or of the tensor that an adapter changes, by name.
        stacks: the stacks of blocks.

    Returns:
        ``layout``, the kind of model whose lists of numbers fit, if any; ``lists``, the blocks that each number of
        numbers stands for; and ``blocks``, one entry a block in order: its name, the numbers of tensors and of
        parameters, and the number of tensors of each element.
    """
    found: dict[NamedBlock, list[str]] = {}
    for name in shapes:
        found.setdefault(find_block(name, stacks.position(name)), []).append(name)
    lists = LISTS.get(stacks.layout, {})
    return {
        "layout": NAMES.get(stacks.layout),
        "lists": {str(count): describe_blocks(labels) for count, labels in lists.items()},
        "blocks": [
            {
                "name": str(block),
                "tensors": len(found[block]),
                "parameters": sum(prod(shapes[name]) for name in found[block]),
                "elements": _count_elements(found[block]),
            }
            for block in sorted(found, key=lambda block: block.order)
        ],
    }


def _count_elements(names: list[str]) -> dict[str, int]:
    """Return the number of tensors of each element; fused projections count for each of their parts."""
    counts = Counter(element for name in names for element in frozenset().union(*find_parts(name)))
    return dict(sorted(counts.items()))
