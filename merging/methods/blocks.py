"""Blocks: multiply each model's change by a weight for each block of the model, before any method.

The engine multiplies them where it reads the inputs, so that every method sees them as if they were the models'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, cast

from pydantic import BeforeValidator, Field

from merging.errors import OptionError, option
from merging.maths.block_weights import BlockWeights, ByBlock
from merging.maths.coefficients import spread
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.contract.method import Method
from merging.methods.contract.wrapper import Wrapper

__all__ = ["BlockWeighted", "interpolate", "read_weights", "scale_changes", "scales_at"]


def read_weights(blocks: Any, elements: Any = None) -> BlockWeights | tuple[BlockWeights, ...]:
    """Return weights by block, for all models or one each. Raises ValueError for anything else."""
    counts = {len(value) for value in (blocks, elements) if _is_list(value)}
    if len(counts) > 1:
        raise ValueError(f"{min(counts)} values and {max(counts)} values: give one for all models, or one each of both")
    if not counts:
        return _read(blocks, elements)
    (count,) = counts
    each_blocks = blocks if _is_list(blocks) else [blocks] * count
    each_elements = elements if _is_list(elements) else [elements] * count
    return tuple(map(_read, each_blocks, each_elements))


def _is_list(value: Any) -> bool:
    """Return whether a value is one for each model, and not a list of numbers for the blocks of all."""
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in value)


def _read(blocks: Any, elements: Any) -> BlockWeights:
    if isinstance(blocks, BlockWeights) and elements is None:
        return blocks
    if blocks is None and elements is None:
        return BlockWeights(preset="ALL")
    return BlockWeights.read(blocks.plain() if isinstance(blocks, BlockWeights) else blocks, elements)


def _validate(value: Any) -> Any:
    bound = value if isinstance(value, tuple) else (value,)
    return value if all(isinstance(each, (float, BlockWeights)) for each in bound) else read_weights(value)


class BlockWeighted(Wrapper):
    """Multiply what each model changed by a weight that depends on the block and the element of the tensor.

    The weights are a list of numbers, a preset, or names with values, as in MBW and LBW (merge block weighted, LoRA
    block weight). `--blocks` and `--elements` of any merge put this wrapper around it. With weights of 1 the merge is
    the merge without them. A model whose weight is 0 does not touch the tensor. Without a base two checkpoints are
    interpolated: the weight is the second model's share in `linear`, and the way from the first to the second in
    `slerp`. It costs nothing.

    Methods that merge weights, and not changes, get the base plus the multiplied change of each model.
    """

    name: ClassVar[str] = "blocks"
    summary: ClassVar[str] = "weigh each model's change by block and element"
    paper: ClassVar[str] = ""

    blocks: Annotated[float | BlockWeights | tuple[float | BlockWeights, ...], BeforeValidator(_validate)] = Field(
        1.0, description="weights by block: numbers, a preset such as INALL, or names with values, as in IN08:0.5"
    )

    def multiple(self, models: int) -> float | None:
        return self.then.multiple(models)


def scales_at(method: Method, site: Site, models: int) -> tuple[float, ...]:
    """Return the number that each model's change is multiplied by at a site, or nothing if all are 1.

    Raises :class:`~merging.errors.OptionError` for weights that do not fit the model.
    """
    link = next((link for link in method.links() if isinstance(link, BlockWeighted)), None)
    if link is None:
        return ()
    scales = tuple(spread(cast("BlockWeighted", link.at(site)).blocks, models))
    return scales if any(scale != 1 for scale in scales) else ()


def scale_changes(stack: Stack, scales: Sequence[float], origin: Tensor | None = None) -> Stack:
    """Return a stack with the change of each model multiplied by its number; ``origin`` is the base of weights."""
    deltas: list[Delta] = []
    for delta, scale in zip(stack.deltas, scales, strict=True):
        if scale == 1:
            deltas.append(delta)
        elif origin is not None:
            deltas.append(Dense(origin + (delta.dense() - origin) * scale if scale else origin))
        elif scale:
            deltas.append(delta.scaled(scale))
        else:  # nothing, whatever it holds
            deltas.append(LowRank.zero(delta) if isinstance(delta, LowRank) else Dense(torch.zeros_like(delta.value)))
    return Stack(
        deltas, stack.models, [bool(scale) and there for scale, there in zip(scales, stack.present, strict=True)]
    )


def interpolate(method: Method, models: int) -> Method:
    """Return the method that interpolates two checkpoints by the weights of their blocks, without a base.

    Raises :class:`~merging.errors.OptionError` for methods and weights that give no such interpolation.
    """
    if not isinstance(method, BlockWeighted):
        return method
    if "blocks" not in method.model_fields_set:
        return method.then
    needs = f"give {option('base')}, the model that they were trained from"
    inner, weights = method.then, method.blocks
    if inner.name not in ("linear", "nuslerp", "slerp") or models != 2 or inner.merge_space != "weights":
        raise OptionError(
            f"weights by block without a base are the second model's share, in linear, slerp or nuslerp of two models: "
            f"use one of these, or {needs}"
        )
    if isinstance(weights, tuple):
        raise OptionError(f"weights by block without a base are the second model's: give them once, or {needs}")
    if {"weights", "t"} & inner.model_fields_set:
        raise OptionError(
            f"weights by block take the place of {inner.name}'s own: leave one of the two out, or {needs}"
        )
    share = ByBlock(**dict(weights)) if isinstance(weights, BlockWeights) else weights
    if inner.name == "slerp":
        return inner.model_copy(update={"t": share})
    rest = share.model_copy(update={"complement": True}) if isinstance(share, ByBlock) else 1 - share
    return inner.model_copy(update={"weights": (rest, share)})
