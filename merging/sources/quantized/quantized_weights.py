"""Quantised weights: recognised by names and types, and refused, or for simple kinds turned into ordinary numbers.

They are converted piece by piece while they are read; no weight is ever dequantised as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.errors import FormatError, QuantizedError, option
from merging.sources.quantized.bitsandbytes_4bit import open_four_bit, parts_of
from merging.sources.quantized.dequantized_tensors import Cast, Mxfp4, Scaled
from merging.sources.quantized.open_packed import open_packed
from merging.sources.quantized.quantized_parts import QUANTIZATION_KEYS, QuantizedParts, QuantizedWeight
from merging.sources.quantized.scale_grid import scale_grid
from merging.sources.stored import Stored

__all__ = ["QUANTIZED", "SIMPLE", "dequantize_tensors", "refuse_quantized"]

QUANTIZED = {
    ".bitsandbytes__nf4": "bitsandbytes 4-bit",
    ".bitsandbytes__fp4": "bitsandbytes 4-bit",
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    ".weight_packed": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_inv": "block FP8",
    ".weight_scale": "scaled FP8 or integers",
    "_blocks": "MXFP4",
    ".W_q": "HQQ",
    ".codes": "AQLM",
    ".qbiases": "MLX",
    ".weight_scales": "EETQ",
    "._scale": "quanto",
    ".centroids": "VPTQ",
    ".dense_weights": "SpQR",
}
"""The last part of the names of tensors that belong to quantised weights, and the kind."""

_MARKER = 1 << 12
"""The largest size in bytes of a marker that is read."""

_INSTEAD = "merge the model it was made from, and quantise the result"
SIMPLE = (
    "block FP8", "scaled FP8 or integers", "MXFP4", "NVFP4", "compressed-tensors", "GPTQ or AWQ", "bitsandbytes 8-bit",
    "bitsandbytes 4-bit",
)  # fmt: skip
"""The kinds that can be turned into ordinary numbers."""

_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")
_PACKED = ("U8", "I8", "U32", "I32")
_WAYS = {
    "compressed-tensors": "or load it in transformers with run_compressed=False and save it",
    "MLX": "or convert it with mlx_lm.convert --dequantize",
}
"""Other ways out, by kind."""

_CAST = ("F8_E4M3", "F8_E5M2")
"""Types that files also hold without scales, as plain numbers."""

_COMPRESSED = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision",
)  # fmt: skip
"""Formats of compressed-tensors."""

_COMFY = (".comfy_quant", "scaled_fp8")
"""Markers of ComfyUI: how a layer is quantised, as JSON; and that scales are called ``scale_weight``."""

_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")

_NO_SCALES = ("BOOL", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "C64")
"""Types that no scales have."""

_SCALES = ("_scale_inv", "_scale")
_BESIDE = (
    ".weight_format", ".input_scale", ".input_scale_ub", ".activation_scale", ".k_scale", ".v_scale", ".q_scale",
    ".input_global_scale", ".qscale_act", "_activation_scale", "_input_scale", ".scale_input", *_COMFY,
)  # fmt: skip
"""Tensors for quantised activations and caches, which ordinary weights do not need."""


def refuse_quantized(path: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any], asked: bool = False) -> None:
    """Raise :class:`~merging.errors.QuantizedError` for quantised weights, with their kind and a way out.

    ``asked`` says that weights of the simple kinds were dequantised already.
    """
    stated = _stated_quantization(config)
    if stated is not None and not (asked and _is_simple(stated)):
        kind = _method(stated)
        raise QuantizedError(f"{path}: is quantised ({kind}, says its config): {_way(kind, _is_simple(stated), asked)}")
    for name, stored in tensors.items():
        tail = _tail(name)
        if tail in QUANTIZED and (tail != "_blocks" or stored.dtype_name == "U8" or not stored.floating):
            kind = QUANTIZED[tail]
            raise QuantizedError(f"{path}: is quantised ({kind}, says {name}): {_way(kind, kind in SIMPLE, asked)}")
        if stored.dtype_name.startswith(("F8_", "F6_")) or stored.dtype_name == "F4":
            way = _way("", stored.dtype_name in _CAST or any(name + ending in tensors for ending in _SCALES), asked)
            codes = f"{stored.dtype_name} codes{' without their scales' if asked else ''}"
            raise QuantizedError(f"{path}: {name} holds {codes}, so the model is quantised: {way}")
        if tail == ".weight" and stored.dtype_name in _PACKED and len(stored.shape) > 1:
            way = _way("MLX" if stored.dtype_name == "U32" else "", False, asked)
            raise QuantizedError(f"{path}: {name} holds {stored.dtype_name} codes, so the model is quantised: {way}")


def _tail(name: str) -> str:
    """Return the end of a name that may reveal quantised weights: trying 20 endings on 50,000 names would take long."""
    return "_blocks" if name.endswith("_blocks") else name[name.rfind(".") :]


def _check_marker(path: Path, name: str, stored: Stored) -> None:
    """Refuse a layer for which ComfyUI's marker names another scheme than codes times a scale."""
    if not stored.at_hand or stored.dtype_name != "U8" or stored.numel > _MARKER:
        return  # its codes show the same, less clearly
    text = bytes(stored.read().flatten().tolist()).decode(errors="replace")
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError):
        stated = None
    format = stated.get("format") if isinstance(stated, dict) else None
    if format not in _COMFY_FORMATS:
        raise FormatError(f"{path}: is quantised ({str(format)[:40]!r}, says {name}): {_way('', False, True)}")


def _way(kind: str, simple: bool, asked: bool) -> str:
    if simple and not asked:
        return f"use {option('dequantize', True)} to merge it as ordinary numbers, or {_INSTEAD}"
    beyond = f"{option('dequantize', True)} does not understand these: " if asked else ""
    return f"{beyond}{_INSTEAD}{', ' + _WAYS[kind] if kind in _WAYS else ''}"


def _stated_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a config's statement of its quantisation, None without one."""
    return QuantizedParts(config, {}, {}).stated or None


def _method(stated: Mapping[str, Any]) -> str:
    """Return the kind that a config states, under the name used here."""
    method = str(stated.get("quant_method", "MLX" if "group_size" in stated else "unknown method"))
    if method == "bitsandbytes":
        return "bitsandbytes 8-bit" if stated.get("load_in_8bit") else "bitsandbytes 4-bit"
    return method


def _is_simple(stated: Mapping[str, Any]) -> bool:
    """Whether a config states weights of codes times a scale, MXFP4, or 4 bits of bitsandbytes."""
    method = str(stated.get("quant_method"))
    if method == "compressed-tensors":
        return stated.get("format") in _COMPRESSED
    if method == "modelopt":
        return stated.get("quant_algo") in ("FP8", "NVFP4")
    return method in ("fp8", "fbgemm_fp8", "mxfp4", "gptq", "awq", "bitsandbytes")


def dequantize_tensors(
    path: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> tuple[dict[str, Stored], dict[str, Any], QuantizedParts]:
    """Return a checkpoint's tensors and config, with quantised weights of simple kinds as ordinary weights.

    Their codes and scales as the files hold them are returned too.

    These are codes (FP8, 8-bit integers) times a scale for all, a row, or a block, as in transformers' ``fp8`` and
    ``fbgemm_fp8``, compressed-tensors, bitsandbytes 8-bit and ComfyUI; MXFP4 as in gpt-oss; 4 bits of bitsandbytes;
    packed weights, as NVFP4, compressed-tensors, GPTQ and AWQ have them; and FP8 without scales. The weights have the
    dtype that the config states, else bfloat16; in 4 bits of bitsandbytes, the dtype that they were quantised from.
    Scales, ComfyUI's markers and the config's ``quantization_config`` are removed. Other quantised weights are
    returned unchanged.

    Raises :class:`~merging.errors.FormatError` for scales that do not fit their weights, and for markers of other
    kinds.
    """
    kind = _type_of(config)
    stated = _stated_quantization(config) or {}
    block = _block_of(stated)
    found: dict[str, QuantizedWeight] = {}
    for name, stored in tensors.items():
        if name.endswith(_COMFY[0]):
            _check_marker(path, name, stored)
        if parts := parts_of(name, tensors):
            own = {part: tensors[part] for part in (name, *parts)}
            found[name] = QuantizedWeight(open_four_bit(path, name, tensors), own)
            continue
        if packed := open_packed(path, name, tensors, stated, kind):
            found[packed[0]] = packed[1]
            continue
        scale = _scale_of(name, stored, tensors)
        if scale is None:
            continue
        scales = tensors[scale]
        own = {name: stored, scale: scales}
        if name.endswith("_blocks"):
            if stored.shape[-1:] != (16,) or len(stored.shape) != 4 or scales.shape != stored.shape[:-1]:
                raise FormatError(_misfit(path, name, stored, scales))
            found[name.removesuffix("_blocks")] = QuantizedWeight(Mxfp4(kind, stored, scales), own)
            continue
        grid = scale_grid(stored.shape, scales.shape, block)
        if grid is None or scales.dtype_name in _NO_SCALES:
            raise FormatError(_misfit(path, name, stored, scales))
        factor = 1 / 127 if scale.endswith(".SCB") else 1
        found[name] = QuantizedWeight(Scaled(kind, stored, scales, grid, factor), own)
    if not found and not stated and not any(_tail(name) in QUANTIZED for name in tensors):
        codes = {name: stored for name, stored in tensors.items() if stored.dtype_name in _CAST}
        found = {name: QuantizedWeight(Cast(kind, stored), {name: stored}) for name, stored in codes.items()}
    gone = {part: tensors[part] for weight in found.values() for part in weight.parts}
    others = {name: stored for name, stored in tensors.items() if found and name.endswith(_BESIDE)}
    plain = {name: weight.reading for name, weight in found.items()}
    kept = {name: plain.get(name, stored) for name, stored in tensors.items() if name in plain or name not in gone}
    ordinary = {name: stored for name, stored in kept.items() if name not in others} | plain
    return ordinary, _without_quantization(config), QuantizedParts(config, found, others)


def _misfit(path: Path, name: str, stored: Stored, scales: Stored) -> str:
    return (
        f"{path}: {name} has the shape {tuple(stored.shape)} and its scales {tuple(scales.shape)} in "
        f"{scales.dtype_name}, which is none of the kinds that {option('dequantize', True)} understands: {_INSTEAD}"
    )


def _scale_of(name: str, stored: Stored, tensors: Mapping[str, Stored]) -> str | None:
    """Return the name of the scales of a tensor of codes, None for any other tensor."""
    if stored.dtype_name == "U8" and name.endswith("_blocks"):
        scale = name.removesuffix("_blocks") + "_scales"
        return scale if scale in tensors and tensors[scale].dtype_name == "U8" else None
    if stored.dtype_name not in _CODES:
        return None
    module = name.removesuffix(".weight")
    candidates = [name + ending for ending in _SCALES]
    if module != name:
        if f"{name}_zero_point" in tensors or f"{name}_scale_2" in tensors:
            return None
        eight = [f"{module}.{end}" for end in ("scale", "qscale_weight", "scale_weight")]
        candidates += [f"{module}.SCB"] if stored.dtype_name == "I8" else eight
    return next((each for each in candidates if each in tensors), None)


def _type_of(config: Mapping[str, Any]) -> str:
    """Return the name of the dtype of a model's ordinary weights, as its config states it."""
    inner = config.get("text_config")
    named = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if str(part.get(key)) in named:
                return named[part[key]]
    return "BF16"


def _block_of(stated: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of the block that shares a scale."""
    groups = stated.get("config_groups")
    nested = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    schemes = [each for each in nested if isinstance(each, dict)]
    sizes = [stated.get("weight_block_size"), *(each.get("block_structure") for each in schemes)]
    sizes += [[1, each["group_size"]] for each in schemes if each.get("group_size")]
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size):
            return size[0], size[1]
    return 128, 128


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(left.get("text_config"), dict):
        left["text_config"] = _without_quantization(left["text_config"])
    return left
