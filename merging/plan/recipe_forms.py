"""Forms of a recipe's values that stand for others: a method as it is written, and a quantised output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from merging.errors import OptionError
from merging.maths.parameters import plain
from merging.methods import chain, parameters_of
from merging.methods.contract.method import Method

__all__ = ["FilePaths", "QuantizedFormat", "make_chain", "read_quantized", "stated_parameters"]


def _read_paths(value: Any) -> Any:
    values = (value,) if isinstance(value, (str, Path)) else value
    listed = isinstance(values, (list, tuple))
    return tuple(str(each) if isinstance(each, Path) else each for each in values) if listed else values


FilePaths = Annotated[tuple[str, ...], BeforeValidator(_read_paths)]
"""Paths of files; one path stands for a list of one."""

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


def stated_parameters(method: Method) -> dict[str, Any]:
    """Return the parameters of a method that differ from their defaults, in plain values."""
    links = method.links()
    fields = [field for link in links for field in parameters_of(type(link))]
    return {
        f"{link.name}.{field}" if fields.count(field) > 1 else field: plain(getattr(link, field))
        for link in links
        for field in parameters_of(type(link))
        if plain(getattr(link, field)) != plain(type(link).model_fields[field].default)
    }
