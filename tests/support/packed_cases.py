"""Weights as compressed-tensors packs them, and its own numbers for them: recorded, or made by it where it is there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["PACKED", "make_packed"]

PACKED: dict[str, tuple[str, dict[str, object]]] = {
    "int4.group": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
    "int4.zeros": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "int8.channel": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int2.channel": ("pack-quantized", {"num_bits": 2, "type": "int", "strategy": "channel"}),
    "int8.plain.group": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}
"""A format of compressed-tensors and the settings of its weights, by case."""


def make_packed(case: str) -> Mapping[str, Tensor]:
    """Return the tensors of a weight as compressed-tensors compresses it, and ``wanted``, as it decompresses them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    format, settings = PACKED[case]
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    weight = (torch.randn(24, 64, generator=torch.Generator().manual_seed(len(case))) * 0.1).bfloat16()
    grouped = weight.view(24, -1, args.group_size) if args.group_size else weight.view(24, 1, 64)
    low, high = grouped.amin(2), grouped.amax(2)
    state = {"weight": weight}
    whole = None
    if case == "nvfp4":
        whole = state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax()).reshape(1)
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = {name: value for name, value in compressor.compress(state, scheme).items() if value is not None}
    wanted = compressor.decompress(dict(packed), scheme)["weight"].bfloat16()
    return {**packed, "wanted": wanted}
