"""Forms of a recipe's values that stand for others: a method as it is written, and a quantised output."""

from __future__ import annotations

from typing import Any, Literal

from merging.errors import OptionError
from merging.methods import chain

__all__ = ["QuantizedFormat", "make_chain", "read_quantized"]

QuantizedFormat = Literal["keep", "fp8", "fp8-channel", "fp8-tensor", "mxfp4", "none"]
"""Formats of quantised outputs; ``none`` is replaced by ``dequantise``."""


def make_chain(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with the method of a chain as it is written, and its parameters by name."""
    if not isinstance(values.get("method"), str):
        return values
    rest = {key: value for key, value in values.items() if key != "parameters"}
    parameters = values.get("parameters") or {}
    if not isinstance(parameters, dict) or not all(isinstance(key, str) for key in parameters):
        raise OptionError(f"parameters should be a mapping of names to values, and is {parameters!r}")
    return rest | {"method": chain(values["method"], parameters)}


def read_quantized(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with ``dequantise`` where the output is quantised, as it is made of ordinary numbers.

    ``none`` means ``dequantise`` alone.
    """
    if values.get("quantize") is None:
        return values
    read = {key: value for key, value in values.items() if key != "dequantize"} | {"dequantise": True}
    return read if values["quantize"] != "none" else {**read, "quantize": None}
