"""Encodings of tensors: in the format that a base has, or in a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, Literal

from merging.sources.quantized.dequantized_tensors import Cast, Mxfp4, Scaled
from merging.sources.quantized.scale_grid import ScaleGrid, scale_grid
from merging.sources.stored import Stored
from merging.storage.encodings import Encoding, GroupEncoding, ScaledEncoding
from merging.storage.output_tensor import OutputTensor

__all__ = ["BLOCK", "GROUP", "NewFormat", "encode_as", "encode_like", "new_statement"]

NewFormat = Literal["fp8", "fp8-channel", "fp8-tensor", "mxfp4"]
"""Formats that weights of 16 bits are quantised to."""

BLOCK = 128
"""The rows and columns of a block of FP8 that shares a scale."""

GROUP = 32
"""The inputs of a group of MXFP4 that shares a scale."""

_TYPES = {"F8_E4M3": "FP8", "F8_E5M2": "FP8 (E5M2)", "I8": "8-bit integers"}


def encode_as(format: NewFormat, out: OutputTensor) -> Encoding:
    """Return the encoding of a tensor in a new format: a matrix, or experts, whose sizes fit the format.

    The scales of blocks are float32. Readers of compressed-tensors cast the others to the type of the model's other
    weights, which is the type of ``out``: so they are written in it.
    """
    name, shape = out.name, out.shape
    if format == "mxfp4":
        experts, inputs, outputs = shape
        groups = inputs // GROUP
        return GroupEncoding(
            name=name,
            shape=shape,
            codes=OutputTensor(f"{name}_blocks", "U8", (experts, outputs, groups, GROUP // 2)),
            scales=OutputTensor(f"{name}_scales", "U8", (experts, outputs, groups)),
            label="MXFP4",
        )
    blocks = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
    scales = {"fp8": blocks, "fp8-channel": (shape[0], 1), "fp8-tensor": (1,)}[format]
    grid = scale_grid(shape, scales, (BLOCK, BLOCK))
    kind = out.dtype_name if format != "fp8" and out.dtype_name in ("BF16", "F16") else "F32"
    assert grid is not None
    return ScaledEncoding(
        name=name,
        shape=shape,
        codes=OutputTensor(name, "F8_E4M3", shape),
        scales=OutputTensor(f"{name}_scale_inv" if format == "fp8" else f"{name}_scale", kind, scales),
        grid=grid,
        label=_label("F8_E4M3", grid, blocks=format == "fp8"),
    )


def encode_like(
    out: OutputTensor, reading: Stored, parts: Mapping[str, Stored], stated: Mapping[str, Any]
) -> Encoding | None:
    """Return the encoding of a merged tensor in the format that the base has it in, None where none is known.

    Args:
        out: the merged tensor.
        reading: the base's weight as ordinary numbers.
        parts: its codes and scales, by their names in the output; the codes first.
        stated: the statement of the quantisation in the base's config.
    """
    name, shape = out.name, out.shape
    if reading.shape != shape or not prod(shape):
        return None
    codes, *rest = (OutputTensor(part, stored.dtype_name, stored.shape) for part, stored in parts.items())
    if isinstance(reading, Mxfp4):
        return GroupEncoding(name=name, shape=shape, codes=codes, scales=rest[0], former=reading.scales, label="MXFP4")
    if isinstance(reading, Cast):
        matrix = (1, prod(shape))
        grid = ScaleGrid(1, 1, 1, matrix, matrix)
        label = f"{_TYPES[codes.dtype_name]} without scales"
        return ScaledEncoding(name=name, shape=shape, codes=codes, scales=None, grid=grid, label=label)
    if not isinstance(reading, Scaled):
        return None
    own = _in_one(reading.grid, shape)
    if own is None:
        return None
    return ScaledEncoding(
        name=name,
        shape=shape,
        codes=codes,
        scales=rest[0],
        former=reading.scales,
        grid=own,
        factor=reading.factor,
        powers=stated.get("scale_fmt") == "ue8m0",
        label=_label(codes.dtype_name, own, blocks=rest[0].name.endswith("_scale_inv")),
    )


def _in_one(grid: ScaleGrid, shape: tuple[int, ...]) -> ScaleGrid | None:
    """Return the grid with matrices that share one scale as a single matrix, None where they share several."""
    count = prod(shape) // prod(grid.matrix)
    if grid.matrices == count:
        return grid
    if grid.rows * grid.columns > 1:
        return None
    matrix = (count * grid.matrix[0], grid.matrix[1])
    return replace(grid, steps=matrix, matrix=matrix)


def _label(dtype_name: str, grid: ScaleGrid, blocks: bool) -> str:
    """Return the name of a format for people."""
    codes = _TYPES.get(dtype_name, dtype_name)
    if blocks:
        return f"{codes} in blocks"
    if grid.steps == grid.matrix:
        return f"{codes} by tensor"
    if grid.steps == (1, grid.matrix[1]):
        return f"{codes} by row"
    if grid.steps == (grid.matrix[0], 1):
        return f"{codes} by column"
    return f"{codes} in blocks of {grid.steps[0]} x {grid.steps[1]}"


def new_statement(format: NewFormat, left: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a new format, with the modules that it leaves out.

    transformers and vLLM read all of them.
    """
    if format == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": left,
        }
    if format == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": left}
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**common, "strategy": format.removeprefix("fp8-"), "dynamic": False}
    activations = {**common, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
        "kv_cache_scheme": None,
    }
