"""A tensor of a model: its kind and its position in the depth, found from its name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from merging.display.tables import Displayed
from merging.maths.layers import BEFORE_BLOCKS, LayerPosition, Stacks

__all__ = ["Site", "TensorKind", "inputs_by_outputs", "site_of"]

TensorKind = Literal["matrix", "embedding", "vector", "conv", "experts"]
"""The kind of a tensor.

``matrix``: a linear layer's weight. ``embedding``: a table that is looked up by row. ``vector``: anything of one axis,
and norms, biases and learned tokens of more. ``conv``: a convolution, or anything else of three axes. ``experts``:
several matrices, stacked in the first axis.
"""

# The last part of the name shows a table: patch, time and context embedders hold linear layers or convolutions.
_TABLE = re.compile(
    r"(?:^|[._])(?:wte|wpe|shared|embd?|\w*embed|\w*embeddings?|embed_(?!out)\w+|relative_attention_bias)(?:\.weight)?$"
)

_IN_TABLES = ("emb", "wte", "wpe", "shared", "relative_attention_bias")
"""Parts of names, one in each name of a table: looking for them is faster than the expression."""

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")

# Norms by head, biases by expert or head, tables of biases, learned tokens: nothing that a vector is multiplied by.
_NO_MAP = ("norm.weight", "bias", "bias_table", "A_log", "token", "tokens", "mask_emb", "probe")

_EXPERTS = re.compile(r"expert|_moe\b")


@dataclass(frozen=True, slots=True, repr=False)
class Site(Displayed):
    """A tensor of the model, or a block of one: its name, shape and kind, and its position in the depth.

    Attributes:
        name: the name in the base.
        shape: the shape of the tensor, or of the block.
        position: the position in the depth of the model.
        start: the offset of a block, in elements of the flattened tensor.
        kind: what the tensor is.
        axis: the axis of a matrix's inputs: 1 as in PyTorch's linear layers, 0 in GPT-2's and in tables, whose input
            is the row.
        side: the shorter side of the original matrix when this is the small core of a factored one, else 0.
    """

    name: str
    shape: tuple[int, ...]
    position: LayerPosition = BEFORE_BLOCKS
    start: int = 0
    kind: TensorKind = "matrix"
    axis: int = 1
    side: int = 0

    @property
    def depth(self) -> float:
        """The depth of the position: 0 in the first block, 1 in the last; 0 outside the stacks."""
        return self.position.depth

    @property
    def row(self) -> int:
        """The elements in a row: of a matrix or table as stored; of a convolution, one output; of a vector, all."""
        if self.kind == "vector" or not self.shape:
            return max(1, prod(self.shape))
        return max(1, prod(self.shape[1:]) if self.kind == "conv" else self.shape[-1])

    def block(self, shape: tuple[int, ...], start: int) -> Site:
        """Return the site of a block of the given shape that starts at a flat offset."""
        place, kind, axis, side = self.position, self.kind, self.axis, self.side  # replace() takes twice as long
        return Site(self.name, shape, place, start, kind=kind, axis=axis, side=side)


def inputs_by_outputs(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the matrices that are stored as inputs by outputs, as in GPT-2 and models like it.

    The shape of their attention shows it, since others (GPT-BigCode) use the same names for ordinary linear layers.
    """
    turned = any(
        name.endswith("c_attn.weight") and len(shape) == 2 and shape[1] == 3 * shape[0]
        for name, shape in shapes.items()
    )
    return {name for name in shapes if name.endswith(_CONV1D)} if turned else set()


def site_of(
    name: str, shape: tuple[int, ...], stacks: Stacks, transposed: bool = False, beside: str | None = None
) -> Site:
    """Return the site of a tensor.

    Args:
        name: the name in the base.
        shape: the shape.
        stacks: the stacks of blocks.
        transposed: whether a matrix is stored as inputs by outputs.
        beside: the name of a tensor of the same layer, for tensors whose own name the stacks do not know.
    """
    position = stacks.position(beside or name)
    kind = _kind(name, shape)
    axis = 0 if transposed or kind == "embedding" else 1
    return Site(name, shape, position, kind=kind, axis=axis)


def _kind(name: str, shape: tuple[int, ...]) -> TensorKind:
    if len(shape) < 2 or name.endswith(_NO_MAP) or (len(shape) > 2 and shape[0] == 1):
        return "vector"
    if len(shape) == 2:
        return "embedding" if any(part in name for part in _IN_TABLES) and _TABLE.search(name) else "matrix"
    return "experts" if len(shape) == 3 and _EXPERTS.search(name) else "conv"
