"""The options of the public functions, with their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from merging.maths.lazy_torch import Tensor, torch
from merging.plan.layer_stack import LayerStack
from merging.plan.recipe import Recipe

__all__ = [
    "BlockList",
    "MergeOptions",
    "MethodParameters",
    "RecipeOptions",
    "Switch",
    "Value",
    "Values",
    "Weight",
    "Weights",
]

Value = float | str | Mapping[str, float | str]
"""One value everywhere, a gradient from block to block (``"0.2:0.8"``), or a value by pattern of tensor names."""

Values = Value | Sequence[Value] | Mapping[str, float | str | Sequence[float | str]]
"""A value for all models, or one each; by pattern of tensor names each may be a list with a value for each model."""

BlockList = str | Sequence[float] | Mapping[str, float]
"""Weights by block: numbers, a preset or names with values, as text (``"INALL,IN08:0.5"``), a list or a mapping."""

Switch = bool | str | Mapping[str, bool | str]
"""True or false everywhere, steps from block to block (``"true:false"``), or by pattern of tensor names."""

Weight = Value | Tensor
"""A value, or a tensor of one element through which gradients flow."""

Weights = Values | Tensor | Sequence[Weight]
"""A weight for all models, or one each; as a tensor of shape ``[models]`` too."""


class RecipeOptions(TypedDict, total=False):
    """The options of a merge that decide the output's bytes: the fields of :class:`~merging.plan.recipe.Recipe`."""

    base: str | Path | LayerStack | Recipe | None
    kind: Literal["adapter", "model"] | None
    format: Literal["peft", "diffusers", "kohya", "gguf"] | None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | torch.dtype | None
    rank: int | Mapping[str, object] | None
    parts: Mapping[str, object] | None
    experts: Literal["together", "apart"] | None
    layers: int | None
    lora_alpha: float | None
    reduce_intruders: bool | Mapping[str, float] | None
    out_proj_once: bool | None
    shard_size: int | str | None
    on_mismatch: Literal["error", "base"] | None
    vocabulary: Literal["error", "base", "largest"] | None
    tokenizer: str | Path | Mapping[str, object] | None
    chat_template: str | Path | None
    components: str | Sequence[str] | None
    as_trained: Literal["nf4", "fp4", "int8"] | Mapping[str, object] | None
    dequantise: bool | None
    dequantize: bool | None
    quantize: Literal["keep", "fp8", "fp8-channel", "fp8-tensor", "mxfp4", "none"] | None
    stats: str | Path | Sequence[str | Path] | None
    exclude: str | Sequence[str] | None
    allow_different_bases: bool | None
    allow_nonfinite: bool | None
    allow_unmatched: bool | None


class MethodParameters(TypedDict, total=False):
    """The parameters of the package's methods by name; each method's page says what its own do.

    A method of your own takes its parameters itself: ``method=MyMethod(strength=0.5)``.
    """

    agree: Value
    align: Literal["outputs", "inputs"]
    alpha: Weight | None
    axis: Literal["flat", "rows", "columns"]
    blocks: BlockList | Sequence[BlockList | None]
    beta: Weight
    clip: Value
    common: Value
    density: Values
    drop: Values
    elements: BlockList | Sequence[BlockList | None]
    embeddings: bool
    energy: Value
    epsilon: Values
    eta: Value
    filter_wise: bool
    gamma: Values
    keep: Value
    keep_norm: Switch
    max_iter: Value
    max_rank: Value | None
    mode: Literal["closed", "adam", "block", "two_sided"]
    norm: Weight
    normalize: Switch
    off_diagonal: Value
    polarize: Value
    power: Value
    published: bool
    r: Value
    ratio: Value
    refine: Value
    relative: bool
    rescale: Literal["inverse", "l1", "none"]
    rho: Value
    scale: Weight
    scope: Literal["model", "tensor"]
    seed: int
    select: Literal["weights", "deltas"]
    smooth: Literal["mean", "linear", "none"]
    space: Literal["weights", "changes"]
    steps: Value
    stiffness: Value
    strength: Value
    svd: Literal["exact", "fast", "gram", "thin"]
    t: Weight
    tail: Literal["alpha", "depth"]
    threshold: Value
    tol: Value
    variant: Literal["code", "vision", "es", "paper", "a", "b"]
    vote: Literal["plain", "weighted"]
    weights: Weights
    zero: Literal["majority", "plus"]


class MergeOptions(RecipeOptions, MethodParameters, total=False):
    """The options of a merge of files: the recipe's, and the method's parameters by name."""
