"""Checks of the arguments of public functions: a wrong type is one clear error, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from merging.errors import OptionError, nearest
from merging.maths.delta import Dense, LowRank
from merging.maths.lazy_torch import Tensor
from merging.methods import METHODS, links, method_class, parameters_of
from merging.methods.contract.method import Method
from merging.object_stores.store_path import output_path
from merging.plan.layer_stack import LayerStack
from merging.plan.recipe import Entry, Recipe
from merging.type_checks import describe_value

__all__ = [
    "check_deltas",
    "check_entries",
    "check_entry",
    "check_keys",
    "check_keywords",
    "check_layers",
    "check_method",
    "check_path",
    "check_state_dict",
    "check_state_dicts",
]


def check_entries(models: object, name: str = "models") -> list[Entry]:
    """Return the models of a merge of files: paths, recipes, and layers of models. ``name`` is the argument's.

    Raises :class:`~merging.errors.OptionError` for anything else.
    """
    if isinstance(models, (str, Path)):
        raise OptionError(f"{name} should be a list of paths, and is {str(models)!r}: write [{str(models)!r}]")
    found = _as_list(models, "paths", name)
    return [check_entry(model, f"{name}[{position}]") for position, model in enumerate(found)]


def check_entry(value: Any, name: str) -> Entry:
    """Return a model of a recipe. Raise :class:`~merging.errors.OptionError` for a value that is none.

    Recipes and layers may be plain values, as :meth:`~merging.Recipe.to_dict` returns them.
    """
    plain = isinstance(value, Mapping) and not _is_state_dict(value) and {"models", "model", "stack"} & value.keys()
    return value if plain or isinstance(value, (Recipe, LayerStack)) else str(check_path(value, name))


def check_path(value: Any, name: str) -> str | Path:
    """Return a path, or a name on the Hub. Raise :class:`~merging.errors.OptionError` for anything else."""
    if isinstance(value, (str, Path)):
        return value
    if isinstance(value, PathLike):
        return Path(value)
    wanted = "a path" if name in ("output", "report") else "a path or a name on the Hub"
    raise OptionError(f"{name} should be {wanted}, and is {describe_value(value)}{_other_door(value)}")


def check_report(value: Any) -> Path | None:
    """Return the path of a page to write, None without one. Raise :class:`~merging.errors.OptionError` otherwise."""
    return None if value is None else output_path(check_path(value, "report"))


def check_state_dicts(models: object) -> list[Mapping[str, Tensor]]:
    """Return the models of a merge of tensors. Raise :class:`~merging.errors.OptionError` for other values."""
    if _is_state_dict(models):
        raise OptionError("models should be a list of state dicts, and is one state dict: write [first, second]")
    found = _as_list(models, "state dicts")
    return [check_state_dict(model, f"models[{position}]") for position, model in enumerate(found)]


def check_state_dict(value: Any, name: str) -> Mapping[str, Tensor]:
    """Return a state dict. Raise :class:`~merging.errors.OptionError` for anything but tensors by name."""
    if not isinstance(value, Mapping):
        remedy = ": give its state_dict()" if hasattr(value, "state_dict") else ""
        remedy = ": merge() merges files" if isinstance(value, (str, Path)) else remedy
        raise OptionError(f"{name} should be a state dict, and is {describe_value(value)}{remedy}")
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            deltas = isinstance(tensor, (LowRank, Dense))
            remedy = ": merge_deltas() merges changes" if deltas else ""
            raise OptionError(f"{name} should hold tensors by name, and {key!r} is {describe_value(tensor)}{remedy}")
    return value


def check_deltas(adapters: object) -> list[Mapping[str, Dense | LowRank]]:
    """Return the adapters of a merge of changes. Raise :class:`~merging.errors.OptionError` for other values."""
    if isinstance(adapters, Mapping):
        raise OptionError("adapters should be a list with one mapping an adapter, and is one mapping: write [it]")
    found = _as_list(adapters, "mappings from target to change", "adapters")
    for position, adapter in enumerate(found):
        name = f"adapters[{position}]"
        if not isinstance(adapter, Mapping):
            remedy = ": merge() merges files" if isinstance(adapter, (str, Path)) else ""
            remedy = ": merge_peft() merges the adapters of a model" if hasattr(adapter, "peft_config") else remedy
            raise OptionError(
                f"{name} should be a mapping from target to change, and is {describe_value(adapter)}{remedy}"
            )
        for target, change in adapter.items():
            if not isinstance(target, str) or not isinstance(change, (Dense, LowRank)):
                raise OptionError(
                    f"{name} should hold changes (LowRank or Dense) by target, and {target!r} is "
                    f"{describe_value(change)}: peft_deltas() makes them of a PEFT state dict"
                )
    return found


def check_keys(keys: object, models: int) -> None:
    """Raise :class:`~merging.errors.OptionError` unless there is one key for each model, or none at all."""
    if keys is None:
        return
    if not isinstance(keys, Sequence) or not all(isinstance(key, str) for key in keys):
        raise OptionError(f"keys should be a list of texts, and is {describe_value(keys)}")
    if len(keys) != models:
        raise OptionError(f"keys has {len(keys)} values for {models} models: give one key for each model")


def check_layers(layers: int | None) -> None:
    """Raise :class:`~merging.errors.OptionError` for a number of blocks below 1."""
    if layers is not None and layers < 1:
        raise OptionError(f"layers = {layers}: at least one block is needed")


def check_method(method: object) -> None:
    """Raise :class:`~merging.errors.OptionError` for anything but the name of a chain, or a method."""
    if isinstance(method, type) and issubclass(method, Method):
        raise OptionError(f"method should be a name or a method, and is the class {method.__name__}: call it")
    if not isinstance(method, (str, Method)):
        raise OptionError(f"method should be a name or a method, and is {describe_value(method)}")


def check_keywords(keywords: Iterable[str], method: str, options: Sequence[str]) -> None:
    """Refuse a keyword that is spelled like an option, and that is a parameter of no method.

    Raises :class:`~merging.errors.OptionError` with the nearest option or parameter of the chain.
    """
    known = {field for link in links(method) for field in parameters_of(link)}
    for keyword in keywords:
        field = keyword.rpartition(".")[2]
        if field in known or any(field in parameters_of(method_class(name)) for name in METHODS):
            continue
        longer = [each for each in options if keyword.startswith(f"{each}_")]  # mergekit's base_model
        if near := nearest(longer[0] if longer else keyword, [*options, *known]):
            raise OptionError(f"{keyword!r} is no option, and no parameter of {method!r}{near}")


def _as_list(values: Any, items: str, name: str = "models") -> list[Any]:
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        return list(values)
    remedy = _other_door(values)
    if isinstance(values, Iterator):
        remedy = ": make a list of it, in the order of the weights"
    raise OptionError(f"{name} should be a list of {items}, and is {describe_value(values)}{remedy}")


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())


def _other_door(value: object) -> str:
    """Return the function that takes such a value, for the end of a message."""
    if _is_state_dict(value):
        return ": merge_state_dicts() merges tensors"
    if hasattr(value, "peft_config") and hasattr(value, "get_base_model"):
        return ": merge_peft() merges the adapters of a model"
    if hasattr(value, "state_dict"):
        return ": save it first, or give its state_dict() to merge_state_dicts()"
    return ""
