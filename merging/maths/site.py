"""Where a tensor sits in a model and what it is: told from its name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from merging.maths.layers import Stacks

__all__ = ["Kind", "Site", "inputs_by_outputs", "site_of"]

Kind = Literal["matrix", "embedding", "vector", "conv", "experts"]
"""What a tensor is: a linear layer's weight, a table that is looked up by row, anything of one axis (or a norm, a bias
or a learned token of more), a convolution (or anything else of three axes), matrices side by side in the first axis."""

# The last part of the name tells a table: patch, time and context embedders hold linear layers or convolutions.
_TABLE = re.compile(
    r"(?:^|[._])(?:wte|wpe|shared|embd?|\w*embed|\w*embeddings?|embed_(?!out)\w+|relative_attention_bias)(?:\.weight)?$"
)

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")

# Norms by head, biases by expert or head, tables of biases, learned tokens: nothing that a vector is multiplied by.
_NO_MAP = re.compile(r"(?:norm\.weight|bias|bias_table|A_log|tokens?|mask_emb|probe)$")

_EXPERTS = re.compile(r"expert|_moe\b")


@dataclass(frozen=True, slots=True)
class Site:
    """Where a tensor sits: its name in the base, its shape, and its layer in the stack of blocks it belongs to.

    ``layer`` is None outside the stacks, where ``after`` tells the tensors behind the blocks (final norm, head) from
    those before. ``start`` is the offset of a block of the tensor, in elements of the flattened whole. ``axis`` is that
    of a matrix's inputs: 1 as PyTorch's linear layers have it, 0 for GPT-2's and for tables, whose input is the row.
    ``side`` is the shorter side of the matrix that a core is of, where the shape is that of a core.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    layers: int = 0
    after: bool = False
    start: int = 0
    kind: Kind = "matrix"
    axis: int = 1
    side: int = 0

    @property
    def depth(self) -> float:
        """0 in the first block, 1 in the last (and in an only one); 0 outside the stacks."""
        if self.layer is None:
            return 0.0
        return min(1.0, self.layer / (self.layers - 1)) if self.layers > 1 else 1.0

    @property
    def row(self) -> int:
        """Elements in a row: of a matrix or table as it lies in memory; what makes one output of a convolution; all of
        a vector."""
        if self.kind == "vector" or not self.shape:
            return max(1, prod(self.shape))
        return max(1, prod(self.shape[1:]) if self.kind == "conv" else self.shape[-1])

    def block(self, shape: tuple[int, ...], start: int) -> Site:
        """The same place, narrowed to a block of the given shape that starts at a flat offset."""
        return replace(self, shape=shape, start=start)


def inputs_by_outputs(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The matrices that are stored as inputs by outputs, as GPT-2's and its kin's are, told by their attention's shape.

    Others (GPT-BigCode) use the same names for ordinary linear layers.
    """
    turned = any(
        name.endswith("c_attn.weight") and len(shape) == 2 and shape[1] == 3 * shape[0]
        for name, shape in shapes.items()
    )
    return {name for name in shapes if name.endswith(_CONV1D)} if turned else set()


def site_of(
    name: str, shape: tuple[int, ...], stacks: Stacks, transposed: bool = False, beside: str | None = None
) -> Site:
    """The site of a tensor; ``transposed`` says that a matrix is stored as inputs by outputs.

    ``beside`` is the name of a tensor of the same layer, by which the layer is told if the stacks know it and not this.
    """
    place = stacks.place(beside or name)
    kind = _kind(name, shape)
    axis = 0 if transposed or kind == "embedding" else 1
    return Site(name, shape, place.layer, place.layers, place.after, kind=kind, axis=axis)


def _kind(name: str, shape: tuple[int, ...]) -> Kind:
    if len(shape) < 2 or _NO_MAP.search(name) or (len(shape) > 2 and shape[0] == 1):
        return "vector"
    if len(shape) == 2:
        return "embedding" if _TABLE.search(name) else "matrix"
    return "experts" if len(shape) == 3 and _EXPERTS.search(name) else "conv"
