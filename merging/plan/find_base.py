"""The base of adapters, as they state it; for a quantised copy of a model, the model itself in 16 bits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import InputError, MergingError, QuantizedError, option
from merging.hub.address import hub_address, local_path
from merging.hub.cards import stated_base_models
from merging.hub.open_model import open_model
from merging.hub.repository import open_repository
from merging.plan.as_trained import TrainedFormat, stated_format
from merging.sources import Adapter, Checkpoint
from merging.sources.model_config import read_config
from merging.sources.small_files import is_there

__all__ = ["FoundBase", "find_base", "unquantized_name"]

_MARKS = re.compile(
    r"[-_.](unsloth|bnb|[0-9]-?bit|u?int[0-9]|fp8|nf4|fp4|nvfp4|mxfp4|gptq|awq|quantized|dynamic|w[0-9]+a[0-9]+|"
    r"[0-9]+bpw|hqq|eetq|autoround|gguf)(?=[-_.]|$)",
    re.IGNORECASE,
)
"""Parts of names by which quantised copies of a model say so."""

_COPIES = ("-BF16", "-bf16")
"""Ends of the names of 16-bit copies, where the model itself was published quantised."""


@dataclass(frozen=True, slots=True)
class FoundBase:
    """A base that was found.

    Attributes:
        name: its path or its name on the Hub.
        dequantize: whether it has to be read with its quantised weights as ordinary numbers.
        notice: a remark for people on the choice.
        trained: the format of bitsandbytes in which the adapters were trained on it, if that is known.
        quantization: the ``quantization_config`` of the quantised copy that the adapters state, if it is found.
    """

    name: str
    notice: str
    dequantize: bool = False
    trained: TrainedFormat | None = None
    quantization: Mapping[str, Any] | None = None


def find_base(adapters: Sequence[Adapter], dequantize: bool = False) -> FoundBase:
    """Return the base that adapters state.

    A quantised copy (``-bnb-4bit``, ``-GPTQ``, ``-AWQ``, ``-FP8``) is replaced by its 16-bit twin: the same name
    without these parts, or else the model that its card names. Without a twin, weights that are quantised in a simple
    way are read as ordinary numbers. Only headers, configs and cards are read.

    Args:
        adapters: the adapters; the first that states a base counts.
        dequantize: whether the stated base itself is read, quantised as it may be.

    Raises:
        InputError: if no adapter states a base, or it is not found.
        QuantizedError: if it is quantised in a way that is not read, and no twin is found.
    """
    adapter = next((each for each in adapters if each.base), None)
    if adapter is None or adapter.base is None:
        raise InputError(f"{adapters[0].path}: states no base: give it with {option('base')}")
    name = _with_revision(adapter, adapter.base)
    if dequantize:
        _check_stated(adapter, name, dequantize=True)
        return FoundBase(name, _describe_stated(adapter, name), dequantize=True)
    try:
        _check_stated(adapter, name)
    except MergingError as error:
        marked = isinstance(error, QuantizedError) or unquantized_name(name) != name
        twin = _find_twin(name) if marked else None
        if twin is not None:
            return _describe_twin(adapter, name, twin)
        if not isinstance(error, QuantizedError):
            raise
        return _read_quantized(adapter, name, error)
    return FoundBase(name, _describe_stated(adapter, name))


def unquantized_name(name: str) -> str:
    """Return a model's name or path without the parts that say that it is quantised."""
    parts = re.fullmatch(r"(?P<parent>(?:.*[/\\])?)(?P<name>[^/\\]+)(?P<slash>[/\\]*)", name)
    if parts is None:
        return name
    bare = parts["name"].partition("@")[0]
    plain = _MARKS.sub("", bare)
    return name if plain == bare or not plain else parts["parent"] + plain


def _with_revision(adapter: Adapter, name: str) -> str:
    """Return the name of a base on the Hub with the revision that the adapter's config states."""
    revision = adapter.config.get("revision")
    address = hub_address(name)
    plain = address is not None and address.revision is None and not address.path
    return f"{name}@{revision}" if plain and isinstance(revision, str) and revision not in ("", "main") else name


def _check_stated(adapter: Adapter, name: str, dequantize: bool = False) -> None:
    """Check that a stated base can be opened, and is a full model."""
    try:
        model = open_model(name, dequantize=dequantize)
    except InputError as error:
        raise InputError(
            f"{adapter.path}: states the base {name}, which is not found: give it with {option('base')} ({error})"
        ) from None
    if isinstance(model, Adapter):
        raise InputError(
            f"{adapter.path}: states the base {name}, which is an adapter itself: bake that into its base first, and "
            f"give the result with {option('base')}"
        )


def _find_twin(name: str) -> str | None:
    """Return the 16-bit model that a quantised one is a copy of, None if there is none that can be opened."""
    for candidate in dict.fromkeys(_twins_of(name)):
        try:
            model = open_model(candidate)
        except MergingError:
            continue
        if isinstance(model, Checkpoint):
            return candidate
    return None


def _twins_of(name: str) -> Iterator[str]:
    """Yield the names that the 16-bit twin of a quantised model may have, the likeliest first."""
    plain = unquantized_name(name)
    if plain != name:
        yield plain
    with suppress(MergingError):  # neither here nor on the Hub, or its card cannot be read
        yield from stated_base_models(_folder_of(name) / "README.md")
    address = hub_address(name)
    if address is not None and plain == name:
        yield from (address.repo + end for end in _COPIES)


def _folder_of(name: str) -> Path:
    address = hub_address(name)
    return local_path(name) if address is None else open_repository(address).folder / address.path


def _describe_stated(adapter: Adapter, name: str) -> str:
    return f"the base is {name}, as {adapter.path} states"


def _describe_twin(adapter: Adapter, name: str, twin: str) -> FoundBase:
    quantization = _quantization_of(name)
    return FoundBase(
        twin,
        notice=f"{adapter.path}: states the quantised base {name}: its 16-bit twin {twin} is used instead "
        f"({option('base')} names another)",
        trained=stated_format(quantization) if quantization else _format_in_name(name),
        quantization=quantization,
    )


def _quantization_of(name: str) -> Mapping[str, Any] | None:
    """Return the ``quantization_config`` of a model, None if its config is not found or states none."""
    with suppress(MergingError):
        path = _folder_of(name) / "config.json"
        stated = read_config(path).get("quantization_config") if is_there(path) else None
        return stated if isinstance(stated, dict) else None
    return None


def _format_in_name(name: str) -> TrainedFormat | None:
    """Return the format of bitsandbytes that a name states, None if it states none."""
    bits = re.search(r"[-_.]bnb[-_.]([48])-?bit", name, re.IGNORECASE)
    return None if bits is None else "nf4" if bits[1] == "4" else "int8"


def _read_quantized(adapter: Adapter, name: str, error: QuantizedError) -> FoundBase:
    """Return a quantised base without a twin, if it is quantised in a simple way."""
    try:
        _check_stated(adapter, name, dequantize=True)
    except QuantizedError:
        raise QuantizedError(
            f"{error}. {adapter.path} states it as its base, and no 16-bit twin was found: give the model that it was "
            f"made from with {option('base')}"
        ) from None
    return FoundBase(
        name,
        dequantize=True,
        notice=f"{adapter.path}: states the quantised base {name}, and no 16-bit twin of it was found: its weights are "
        f"read as ordinary numbers",
    )
