"""A model's config.json, with checks of the fields that decide something here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.small_files import read_json

__all__ = ["check_counts", "read_config"]

_COUNT = re.compile(r"num_(\w+_)?(layers|experts|blocks)|n_layers?|(\w+_)?layers|depths?")
"""Fields that state how many modules a model has."""

_MODULES = 1024
"""A number of modules that is allowed whatever the weights, since one tensor may hold the weights of many modules."""


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_FIELDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "architectures": ("a list of names", _is_names),
    "model_type": ("a name", lambda value: isinstance(value, str)),
    "_name_or_path": ("a name", lambda value: isinstance(value, str)),
    "text_config": ("an object", lambda value: isinstance(value, dict)),
    "quantization_config": ("an object", lambda value: isinstance(value, dict)),
    "tie_word_embeddings": ("true or false", lambda value: isinstance(value, bool)),
}
"""The expected type of each field that is not null."""


def read_config(path: Path) -> dict[str, Any]:
    """Read the config of a model. Raises :class:`~merging.errors.FormatError` for one that cannot be understood."""
    config = read_json(path)
    _check(config, str(path))
    if isinstance(config.get("text_config"), dict):
        _check(config["text_config"], f"{path}: text_config")
    return config


def _check(config: Mapping[str, Any], where: str) -> None:
    for field, (wanted, is_right) in _FIELDS.items():
        value = config.get(field)
        if value is not None and not is_right(value):
            raise FormatError(f"{where}: {field} is {str(value)[:80]!r}, and should be {wanted}")


def check_counts(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a config of more modules than ``tensors`` tensors can belong to, before the model is built."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for field, value in part.items():
            if isinstance(value, int) and value > max(_MODULES, tensors) and _COUNT.fullmatch(field):
                raise FormatError(f"config.json of the base: {field} is {value}, and its weights are {tensors} tensors")
