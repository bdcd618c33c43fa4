"""The keys of mergekit's recipes at each level, and words about keys that belong to another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.plan.recipe import FIELDS

__all__ = [
    "CONDITION",
    "MODEL",
    "MODULE",
    "PATH",
    "REFERENCE",
    "SLICE",
    "SOURCE",
    "TOKEN",
    "TOKENIZER",
    "TOKEN_SOURCE",
    "extensions",
    "is_mergekit",
    "top",
]

_OWN = ("merge_method", "base_model", "slices", "modules", "tokenizer_source", "out_dtype")
"""Keys at the top that only recipes of mergekit have."""

_SHARED = ("models", "parameters", "dtype", "tokenizer", "chat_template", "name")
"""Keys at the top that recipes of mergekit and of ours have."""

_INSTEAD = ("models", "method", "base", "parameters", "dtype", "tokenizer", "chat_template", "stack", "name")
"""Fields of ours that mergekit has under its own key, or in its own form."""

_PARAMETER = "it is a parameter: write it under parameters"
_PARAMETERS = dict.fromkeys(
    ("weight", "density", "t", "lambda", "normalize", "gamma", "epsilon", "scale", "rescale", "int8_mask"), _PARAMETER
)
_OURS = {"method": "a recipe has merge_method or method, not both", "base": "with merge_method it is base_model"}
_MIXTURE = dict.fromkeys(
    ("gate_mode", "experts_per_token", "shared_experts"), "it belongs to a mixture of experts: use `merge moe`"
)
_REVISION = {"revision": "write it behind the model, as model: NAME@REVISION"}

MODEL = {"model": "", "parameters": "", "layer_range": "it belongs under slices, as a key of a source"} | (
    _PARAMETERS | _REVISION
)
SOURCE = {"model": "", "layer_range": "", "parameters": ""} | _PARAMETERS | _REVISION
SLICE = {"sources": "", "base_model": "", "parameters": "", "residual_weight": ""} | _PARAMETERS
MODULE = {"slices": "", "models": "", "parameters": ""} | _PARAMETERS
REFERENCE = {"model": "", "lora": "", "override_architecture": "", "path": "", "revision": ""}
PATH = {"path": "", "revision": ""}
CONDITION = {"filter": "", "value": ""}
TOKENIZER = {"source": "", "tokens": "", "pad_to_multiple_of": ""}
TOKEN = {"source": "", "force": ""}
TOKEN_SOURCE = {"kind": "", "model": "", "token": "", "token_id": ""}


def top() -> dict[str, str]:
    """Return the keys at the top of a recipe of mergekit, with our extensions."""
    known = dict.fromkeys((*_OWN, *_SHARED, *extensions()), "") | _OURS | _MIXTURE
    return known | {key: words for key, words in _PARAMETERS.items() if key not in known}


def extensions() -> list[str]:
    """Return the fields of our recipes that a recipe of mergekit may have as well."""
    return sorted(FIELDS - set(_INSTEAD))


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """Return whether the keys of a document are keys of mergekit's schema.

    ``merge_method`` is, unless there is our ``method``; without both, any key that we do not have.
    """
    if "method" in values:
        return "merge_method" in values
    if any(key in values for key in _OWN):
        return True
    models = values.get("models")
    entries = models if isinstance(models, list) else []
    return any(isinstance(each, dict) and {"model", "parameters"} <= set(map(str, each)) for each in entries)
