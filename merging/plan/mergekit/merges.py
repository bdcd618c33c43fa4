"""One merge of a recipe of mergekit in our schema: its models, base, method and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from merging.plan.mergekit.chains import defaults_of
from merging.plan.mergekit.methods import MethodSpec
from merging.plan.mergekit.models import Entry
from merging.plan.mergekit.parameters import Layers, Levels, Stated, check_names, read_parameters
from merging.plan.mergekit.reading import Reading
from merging.plan.recipe_document import Keys

__all__ = ["MergeKeys", "MergeSource", "Translated", "build_merge"]


@dataclass(frozen=True, slots=True)
class Translated:
    """Values in our schema, and the origin of each by its keys."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, origin: str, inner: Translated | None = None) -> None:
        """Add a value with its origin, and the origins of the values in it."""
        self.values[key] = value
        self._nest((key,), origin, inner)

    def put_list(self, key: str, entries: Sequence[tuple[Any, str, Translated | None]], origin: str) -> None:
        """Add a list of values, each with its origin and the origins of the values in it."""
        self.put(key, [value for value, _, _ in entries], origin)
        for index, (_, at, inner) in enumerate(entries):
            self._nest((key, index), at, inner)

    def _nest(self, keys: Keys, origin: str, inner: Translated | None) -> None:
        self.origins[keys] = origin
        for below, each in (inner.origins if inner else {}).items():
            self.origins[(*keys, *below)] = each


@dataclass(frozen=True, slots=True)
class MergeSource:
    """A model of a merge.

    Attributes:
        keys: the way to its entry in the document.
        model: its name, or the recipe that makes it.
        entry: the same in our schema, with its layers.
        start: the number of the first of these layers.
    """

    keys: Keys
    model: Entry
    entry: Entry
    start: int = 0


@dataclass(frozen=True, slots=True)
class MergeKeys:
    """The places of a merge in the document: of the list of its models, of its base and of shared parameters.

    ``layers`` are the layers of a slice, None for whole models.
    """

    models: Keys
    base: Keys
    shared: Sequence[Keys]
    layers: Layers | None = None


def build_merge(
    reading: Reading, spec: MethodSpec, sources: Sequence[MergeSource], base: MergeSource | None, keys: MergeKeys
) -> Translated:
    """Return the merge of the sources in our schema.

    Raises :class:`~merging.errors.OptionError` for a merge that the method does not do, with its line.
    """
    if spec.base == "required" and base is None:
        raise reading.error(("merge_method",), f"{spec.name} needs base_model, the model that the others start from")
    for source in sources:
        check_names(reading, spec, (*source.keys, "parameters"), of_model=True)
    merged = sources
    if spec.base != "ignored" and base is not None:
        merged = [each for each in sources if each.model != base.model]
    _check_count(reading, spec, len(merged), keys.models)
    places = [(*each.keys, "parameters") for each in merged]
    levels = Levels(places, keys.shared, keys.layers, [each.start for each in merged])
    stated = read_parameters(reading, spec, levels)
    origin = reading.document.origin
    entries = [(each.entry, origin((*each.keys, "model")), None) for each in merged]
    if spec.first and base is not None:
        entries.insert(0, (base.entry, origin(keys.base), None))
        base = None
    built = Translated()
    built.put_list("models", entries, origin(keys.models))
    built.put("method", spec.chain, origin(("merge_method",)))
    if base is not None:
        built.put("base", base.entry, origin(keys.base))
    _put_parameters(reading, built, spec, stated)
    if reading.lenient:
        built.put("allow_unmatched", True, origin(()))
    return built


def _check_count(reading: Reading, spec: MethodSpec, count: int, keys: Keys) -> None:
    """Refuse a number of models that the method does not merge. Raises OptionError."""
    least, most = spec.models
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}"
        noun = "model" if wanted == "1" else "models"
        extra = "" if spec.base == "ignored" else ", without its base"
        raise reading.error(keys, f"{spec.name} merges {wanted} {noun}{extra}, and here are {count}")


def _put_parameters(reading: Reading, built: Translated, spec: MethodSpec, stated: dict[str, Stated]) -> None:
    """Add the parameters: given ones, and others that differ from our defaults."""
    fixed: dict[str, Any] = dict(spec.fixed)
    if spec.base == "optional" and "base" in built.values:
        fixed["space"] = "changes"
    if spec.chain == "ties" and stated["ties.density"].value == 1:
        fixed.pop("ties.scope")  # where nothing is trimmed it has no effect
    defaults, inner = defaults_of(spec.chain), Translated()
    method = reading.document.origin(("merge_method",))
    for name, each in stated.items():
        if each.keys is not None or each.value != defaults[name]:
            inner.put(name, each.value, method if each.keys is None else reading.document.origin(each.keys))
            inner.origins.update({(name, *at): reading.document.origin(keys) for at, keys in each.patterns.items()})
    link = "" if "+" in spec.chain else f"{spec.chain}."
    for name, value in fixed.items():
        if name not in inner.values and link + name not in inner.values:
            inner.put(name, value, method)
    if inner.values:
        built.put("parameters", inner.values, reading.document.origin(("parameters",)), inner)
