"""A recipe of ours in mergekit's schema, where mergekit can say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from merging.errors import OptionError
from merging.hub.address import hub_address
from merging.methods import chain, parameters_of
from merging.methods.contract.method import Method
from merging.plan.layer_stack import LayerPart, LayerStack
from merging.plan.mergekit.chains import defaults_of
from merging.plan.mergekit.methods import METHODS, MethodSpec
from merging.plan.mergekit.written_values import spread_value, write_value
from merging.plan.recipe import Entry, Recipe

__all__ = ["write_documents"]

_SAID = {"models", "method", "base", "dtype", "tokenizer", "chat_template", "allow_unmatched"}
"""Fields of recipes that mergekit has in its own form; it takes every filter, whether it matches a tensor or not."""


def write_documents(recipe: Recipe) -> str:
    """Return a recipe as YAML of mergekit: a document, or one for each stage.

    Nothing checks that mergekit means the same by it. Raises :class:`~merging.errors.OptionError` for models, methods
    and fields that mergekit does not have.
    """
    stages = _Stages()
    last = stages.write(recipe)
    return "---\n".join(yaml.safe_dump(each, sort_keys=False, allow_unicode=True) for each in (*stages.documents, last))


@dataclass(frozen=True, slots=True)
class _Merge:
    """The sources of one merge with their parameters, in mergekit's words."""

    method: str
    base: Any
    sources: list[dict[str, Any]]
    shared: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Stages:
    """The documents of stages that later ones name, and the recipes that they write."""

    documents: list[dict[str, Any]] = field(default_factory=list)
    recipes: list[tuple[Entry, str]] = field(default_factory=list)

    def write(self, recipe: Recipe) -> dict[str, Any]:
        """Return a recipe as a document. Raises :class:`~merging.errors.OptionError`."""
        for name, info in Recipe.model_fields.items():
            if name not in _SAID and getattr(recipe, name) != info.default and (name, recipe.kind) != ("kind", "model"):
                key = info.alias or name
                if name == "dequantise" and "quantize" in recipe.model_fields_set:
                    key = "quantize"  # which was read as both
                raise OptionError(f"mergekit has no {key}: leave it out of the recipe")
        first = recipe.models[0]
        if isinstance(first, LayerStack) and _is_copy(recipe):
            document = self._write_slices(first.parts)
        elif any(isinstance(each, LayerStack) for each in recipe.models):
            document = self._write_slices([LayerPart(model=recipe)])
        else:
            document = _with_models(self._write_merge(recipe))
        return document | self._write_fields(recipe)

    def _write_fields(self, recipe: Recipe) -> dict[str, Any]:
        """Return types, tokenizer and chat template. mergekit computes in ``dtype``, so that it is a wide one."""
        values: dict[str, Any] = {}
        if recipe.dtype is not None:
            wide = recipe.dtype if recipe.dtype in ("float32", "float64") else "float32"
            values["dtype"] = wide
            if recipe.dtype != wide:
                values["out_dtype"] = recipe.dtype
        if recipe.tokenizer is not None:
            plain = recipe.model_dump(include={"tokenizer"})["tokenizer"]
            values["tokenizer"] = {"source": plain} if isinstance(plain, str) else plain
        if recipe.chat_template is not None:
            values["chat_template"] = recipe.chat_template
        return values

    def _write_merge(self, recipe: Recipe) -> _Merge:
        method, spec = _find_method(recipe.method)
        models = list(recipe.models)
        base = recipe.base
        if spec.first:
            if base is not None or len(models) != 2:
                raise OptionError(f"{method} of mergekit merges a base and one model: name two models and no base")
            base, models = models[0], models[1:]
        elif spec.base == "ignored" and base is not None and base not in models:
            raise OptionError(f"{method} of mergekit merges the base as one more model: leave base out")
        shared, own = _write_parameters(recipe.method, spec, len(models))
        sources = [self._write_source(each) for each in models]
        for source, parameters in zip(sources, own, strict=True):
            if parameters:
                source["parameters"] = parameters
        stated = None if base is None else self._write_source(base)
        if stated is not None and (spec.first or "layer_range" in stated) and stated not in sources:
            sources.insert(0, dict(stated))
        return _Merge(method, None if stated is None else stated["model"], sources, shared)

    def _write_source(self, entry: Entry) -> dict[str, Any]:
        """Return a model of a merge, with its layers where it has some."""
        if isinstance(entry, LayerStack) and len(entry.parts) == 1 and entry.parts[0].scale == 1:
            return self._write_part(entry.parts[0])
        return {"model": self._name(entry)}

    def _write_part(self, part: LayerPart) -> dict[str, Any]:
        if part.bounds is None:
            raise OptionError("mergekit stacks layers by their numbers: give each part of the stack its layers")
        if part.stack is not None:
            raise OptionError(f"mergekit has no name for one stack of several: {part.layers}")
        return {"model": self._name(part.model), "layer_range": list(part.bounds)}

    def _write_slices(self, parts: Sequence[LayerPart]) -> dict[str, Any]:
        """Return slices: layers of a model, or merges of layers, all by one method."""
        merges = [self._write_slice(part) for part in parts]
        methods = sorted({merge.method for merge in merges})
        if len(methods) > 1:
            raise OptionError(f"mergekit has one method for all slices, and here are {' and '.join(methods)}")
        base = merges[0].base
        slices = []
        for merge in merges:
            each: dict[str, Any] = {"sources": merge.sources}
            if merge.shared:
                each["parameters"] = merge.shared
            if merge.base != base:
                each["base_model"] = merge.base
            slices.append(each)
        return {
            "merge_method": methods[0],
            **({} if base is None else {"base_model": base}),
            "slices": slices,
        }

    def _write_slice(self, part: LayerPart) -> _Merge:
        if isinstance(part.model, Recipe) and part.layers is None and part.scale == 1:
            return self._write_merge(part.model)
        source = self._write_part(part)
        if part.scale != 1:
            source["parameters"] = {"scale": write_value(part.scale)}
        return _Merge("passthrough", None, [source], {})

    def _name(self, entry: Entry) -> Any:
        """Return the name of a model: its own, a model with an adapter, or the name of a stage."""
        if isinstance(entry, str):
            return _reference(entry)
        if isinstance(entry, Recipe) and _is_adapted(entry):
            return f"{entry.base}+{entry.models[0]}"
        for known, name in self.recipes:
            if known == entry:
                return name
        whole = (
            entry if isinstance(entry, Recipe) else Recipe.model_validate({"models": [entry], "method": "passthrough"})
        )
        document = self.write(whole)
        name = f"stage-{len(self.documents) + 1}"
        self.documents.append({"name": name, **document})
        self.recipes.append((entry, name))
        return name


def _with_models(merge: _Merge) -> dict[str, Any]:
    return {
        "merge_method": merge.method,
        **({} if merge.base is None else {"base_model": merge.base}),
        "models": merge.sources,
        **({"parameters": merge.shared} if merge.shared else {}),
    }


def _is_copy(recipe: Recipe) -> bool:
    """Return whether a recipe takes its one model as it is."""
    return len(recipe.models) == 1 and recipe.base is None and recipe.method == chain("passthrough")


def _is_adapted(recipe: Recipe) -> bool:
    """Return whether a recipe is an adapter baked into a model."""
    plain = {key: value for key, value in recipe.to_dict().items() if key not in ("models", "base")}
    names = [*recipe.models, recipe.base]
    bare = all(isinstance(name, str) and "+" not in name for name in names)
    return bare and len(names) == 2 and plain == {"method": "task_arithmetic", "as": "model"}


def _reference(name: str) -> Any:
    """Return a model's name. Signs in a path that mergekit takes for a revision or an adapter make it a mapping."""
    address = hub_address(name)
    if address is not None and address.in_store:
        raise OptionError(f"{name}: mergekit reads no object stores: download the folder, and name that")
    if address is not None and address.path:
        raise OptionError(f"{name}: mergekit reads whole repositories of the Hub: download the folder, and name that")
    if address is not None:
        return str(address)
    return {"model": {"path": name}} if "+" in name or "@" in name else name


def _find_method(method: Method) -> tuple[str, MethodSpec]:
    """Return mergekit's name and specification of a chain. Raises :class:`~merging.errors.OptionError`."""
    for name, spec in METHODS.items():
        if spec.chain == method.chain:
            return name, spec
    raise OptionError(f"mergekit has no method {method.chain}: its methods are {', '.join(METHODS)}")


def _write_parameters(method: Method, spec: MethodSpec, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the parameters for all models, and for each."""
    links = method.links()
    ours = {f"{link.name}.{name}": getattr(link, name) for link in links for name in parameters_of(type(link))}
    ours |= {name.rpartition(".")[2]: value for name, value in reversed(ours.items())}
    if "axis" in ours and "nuslerp_flatten" in spec.parameters:
        ours |= {"flatten": ours["axis"] == "flat", "row_wise": ours["axis"] == "columns"}
    defaults = defaults_of(spec.chain) | {"flatten": True, "row_wise": False}
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, parameter in spec.parameters.items():
        if parameter.idle or parameter.target not in ours or "." in name:
            continue
        try:
            values = [write_value(each, parameter.invert) for each in spread_value(ours[parameter.target], count)]
        except OptionError as error:
            raise OptionError(f"{parameter.target}: {error}") from None
        default = defaults[parameter.target] if parameter.default is None else parameter.default
        if all(value == default for value in values) and not parameter.required:
            continue
        if all(value == values[0] for value in values) and not parameter.required:
            shared[name] = values[0]
        elif not parameter.per_model:
            if any(value != values[0] for value in values):
                raise OptionError(f"mergekit has one {name} for all models, and here are {values}")
            shared[name] = values[0]
        else:
            for each, value in zip(own, values, strict=True):
                each[name] = value
    return shared, own
